"""Training that is broken off and gone on with."""

import functools
import os
import shutil
import signal
import subprocess

from simcse.encoder import weights as w

import numpy as np
import pytest
from conftest import command, refuse, succeed
from training import saving_flags, weights


@pytest.fixture
def flags(sample):
    return functools.partial(saving_flags, sample)


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one) > 50
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("more", [[], ["--chunk_size", 4], ["--pooling", "mean", "--crop_rate", 0.5]])
def test_broken_by_kill_9_and_resumed_is_unbroken_to_the_bit(flags, tmp_path, more):
    steps = 32
    more = ["--epochs", 2, *more]
    succeed("train.py", *flags("--save_dir", "whole", *more), cwd=tmp_path)
    going_on = flags("--save_dir", "broken", "--resume", *more)
    words = command("train.py", *going_on, bare="mean" in more)
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert any("saved broken/model_4" in line for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    left = w.saved_steps(str(tmp_path / "broken"))
    assert left and 4 <= left[-1] < steps
    (tmp_path / "broken" / ".model_99.abc.tmp").mkdir()  # as a kill in the middle of a save leaves one
    result = succeed("train.py", *going_on, cwd=tmp_path)
    assert f"going on from broken/model_{left[-1]}" in result.stderr and "saved broken/model_4\n" not in result.stderr
    assert_equal(weights(tmp_path / "whole" / f"model_{steps}"), weights(tmp_path / "broken" / f"model_{steps}"))
    assert not [name for name in os.listdir(tmp_path / "broken") if name.startswith(".")]
    again = succeed("train.py", *going_on, cwd=tmp_path)  # nothing is left to do
    assert f"going on from broken/model_{steps}" in again.stderr and "global step" not in again.stderr


def test_only_the_newest_has_training_state_and_old_ones_go(flags, tmp_path):
    succeed("train.py", *flags("--epochs", 1, "--keep_checkpoints", 3), cwd=tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(os.listdir(folder)) == ["model_12", "model_16", "model_8"]
    assert [name for name in os.listdir(folder) if "training_state.json" in os.listdir(folder / name)] == ["model_16"]
    assert w.newest_resumable(str(folder)) == str(folder / "model_16")


def test_resuming_another_run_is_refused(flags, sample, tmp_path):
    succeed("train.py", *flags("--epochs", 1), cwd=tmp_path)
    newest = tmp_path / "checkpoints" / "model_16"
    (tmp_path / "other.csv").write_text("另一句\n再一句\n" * 64, encoding="utf-8")
    for more, message in ((["--batch_size", 4], "another batch_size 4 instead of 8, epochs 3 instead of 1"),
                          (["--epochs", 1, "--train_set_file", tmp_path / "other.csv"], "another train_set_file;"),
                          (["--epochs", 1, "--infer_with_fc_pooler"],
                           "another infer_with_fc_pooler True instead of False;")):
        line = refuse("train.py", *flags("--resume", newest, *more), cwd=tmp_path)
        assert message in line and "--init_from_ckpt" in line
    shutil.copytree(newest, tmp_path / "bare")
    os.remove(tmp_path / "bare" / "training_state.json")
    assert "no checkpoint folder that training can go on from" in refuse("train.py", *flags("--resume", "bare"),
                                                                        cwd=tmp_path)


def test_nothing_to_resume_starts_from_the_beginning(flags, tmp_path):
    assert "going on" not in succeed("train.py", *flags("--epochs", 0, "--resume"), cwd=tmp_path).stderr


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)
