"""Training that is interrupted and resumed."""

import argparse
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys

import model
import predict
import train
from scripts import pretrain
from simcse import flags as script_flags
from simcse.console import InputError
from simcse.training import checkpoints, trainer
from simcse.training.state import RunSettings, check_settings

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


@pytest.mark.parametrize("more", [
    [], pytest.param(["--chunk_size", 4, "--pooling", "mean", "--crop_rate", 0.5],
                     marks=[pytest.mark.default_stack, pytest.mark.slow])])
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
    left = checkpoints.saved_steps(str(tmp_path / "broken"))
    assert left and 4 <= left[-1] < steps
    (tmp_path / "broken" / ".model_99.abc.tmp").mkdir()  # as a kill in the middle of a save leaves one
    result = succeed("train.py", *going_on, cwd=tmp_path)
    assert f"resuming from broken/model_{left[-1]}" in result.stderr and "saved broken/model_4\n" not in result.stderr
    assert_equal(weights(tmp_path / "whole" / f"model_{steps}"), weights(tmp_path / "broken" / f"model_{steps}"))
    assert not [name for name in os.listdir(tmp_path / "broken") if name.startswith(".")]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").rglob("*")}
    again = succeed("train.py", *going_on, cwd=tmp_path)  # nothing is left to do
    assert f"resuming from broken/model_{steps}: all steps of the run are done\n" in again.stderr
    assert "global step" not in again.stderr and "saved" not in again.stderr
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").rglob("*")}
    finished = tmp_path / "broken" / f"model_{steps}"
    elsewhere = succeed("train.py", *flags("--save_dir", "new", "--resume", finished, *more), cwd=tmp_path)
    assert f"saved new/model_{steps}\n" in elsewhere.stderr


def test_only_the_newest_has_training_state_and_old_ones_go(flags, tmp_path):
    succeed("train.py", *flags("--epochs", 1, "--keep_checkpoints", 3), cwd=tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(os.listdir(folder)) == ["model_12", "model_16", "model_8"]
    assert [name for name in os.listdir(folder) if "training_state.json" in os.listdir(folder / name)] == ["model_16"]
    assert checkpoints.newest_resumable(str(folder)) == str(folder / "model_16")


def test_resuming_another_run_is_refused(flags, sample, tmp_path):
    succeed("train.py", *flags("--epochs", 1), cwd=tmp_path)
    newest = tmp_path / "checkpoints" / "model_16"
    (tmp_path / "other.csv").write_text("另一句\n再一句\n" * 64, encoding="utf-8")
    for more, message in (
            (["--batch_size", 4],
             "--batch_size is 4, the checkpoint has 8; --epochs is 3, the checkpoint has 1 (default). Give the same"),
            (["--epochs", 1, "--train_set_file", tmp_path / "other.csv"],
             "settings: --train_set_file is another file than the checkpoint's."),
            (["--epochs", 1, "--infer_with_fc_pooler"],
             "settings: --infer_with_fc_pooler is True, the checkpoint has False (default).")):
        line = refuse("train.py", *flags("--resume", newest, *more), cwd=tmp_path)
        assert message in line and "--init_from_ckpt" in line
    shutil.copytree(newest, tmp_path / "bare")
    os.remove(tmp_path / "bare" / "training_state.json")
    assert "no checkpoint folder that training can go on from" in refuse("train.py", *flags("--resume", "bare"),
                                                                        cwd=tmp_path)


def test_nothing_to_resume_starts_from_the_beginning(flags, tmp_path):
    assert "resuming" not in succeed("train.py", *flags("--epochs", 0, "--resume"), cwd=tmp_path).stderr


# ------------------------------------------------------------------------------------------- what a resumed run shares
DEFAULTS = {"margin": 0.0, "pooling": None, "chunk_size": None}


@pytest.mark.parametrize("recorded, changes", [
    ({"margin": 0.1, "pooling": "mean", "chunk_size": None}, None),
    ({"margin": 0.1, "pooling": "mean"}, None),  # older than --chunk_size
    # older than --pooling, too: the run had its default
    ({"margin": 0.1}, "--pooling is mean, the checkpoint has None (default)"),
    ({"margin": 0.2, "pooling": "mean"}, "--margin is 0.1, the checkpoint has 0.2"),
    ({"margin": 0.1, "pooling": "mean", "chunk_size": 4}, "--chunk_size is None (default), the checkpoint has 4"),
    ({"margin": 0.1, "pooling": "mean", "objective": "contrastive", "dup_rate": 0.0}, None),
    ({"margin": 0.1, "pooling": "mean", "objective": "mlm"},
     "the checkpoint has --objective mlm, which this version does not have"),
    ({"margin": 0.1, "pooling": "mean", "newer": 1}, "the checkpoint has --newer 1, which this version does not have")])
def test_settings_of_older_and_of_other_versions(recorded, changes):
    """A record without a flag counts as the flag's default; one with a flag that is gone as a run of other settings."""
    settings = RunSettings({"margin": 0.1, "pooling": "mean", "chunk_size": None}, DEFAULTS)
    if changes is None:
        check_settings("model_1", settings, recorded)
        return
    with pytest.raises(InputError) as raised:
        check_settings("model_1", settings, recorded)
    assert f"--resume model_1: different settings: {changes}. Give" in str(raised.value)


def test_a_changed_training_file_is_named_without_its_digests():
    with pytest.raises(InputError, match="different settings: --train_set_file is another file than"):
        check_settings("model_1", RunSettings({"train_set_file": "a" * 64}, {}), {"train_set_file": "b" * 64})


@pytest.mark.parametrize("script", [train, pretrain])
def test_every_flag_is_in_one_table_of_what_resume_does_with_it(monkeypatch, sample, script):
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", "--train_set_file",
                                      str(sample / "train_unsupervised.csv")])
    args = script.parse_args()
    assert args.shared_defaults["learning_rate"] == 5e-5 and args.shared_defaults["precision"] == "auto"
    assert not set(args.shared_defaults) & {*script_flags.START_FLAGS, *script_flags.FREE_FLAGS}
    where = "has to be in one of START_FLAGS, SHARED_FLAGS and FREE_FLAGS"
    with monkeypatch.context() as missing:
        others = tuple(name for name in script_flags.SHARED_FLAGS if name != "learning_rate")
        missing.setattr(script_flags, "SHARED_FLAGS", others)
        with pytest.raises(ValueError, match=f"--learning_rate {where} .* it is in 0"):
            script.parse_args()
    monkeypatch.setattr(script_flags, "FREE_FLAGS", (*script_flags.FREE_FLAGS, "batch_size"))
    with pytest.raises(ValueError, match=f"--batch_size {where} .* it is in 2"):
        script.parse_args()


def test_the_tables_name_no_flag_that_there_is_not(monkeypatch, sample):
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", "--train_set_file",
                                      str(sample / "train_unsupervised.csv")])
    there = {*vars(train.parse_args()), *vars(pretrain.parse_args())}
    assert {*script_flags.START_FLAGS, *script_flags.SHARED_FLAGS, *script_flags.FREE_FLAGS} == there - {
        "shared_defaults"}


def test_settings_of_the_loss_are_flags_that_a_resumed_run_shares(monkeypatch, sample):
    """With one default each, in LossSettings, train.py and predict.py."""
    defaults = dataclasses.asdict(model.LossSettings())
    assert defaults.keys() <= set(script_flags.SHARED_FLAGS)
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", "--train_set_file",
                                      str(sample / "train_unsupervised.csv")])
    assert defaults.items() <= vars(train.parse_args()).items()
    monkeypatch.setattr(sys, "argv", ["script", "--device", "cpu", "--params_path",
                                      str(sample / "train_unsupervised.csv"), str(sample / "test.csv")])
    args = predict.parse_args()
    assert (args.margin, args.scale) == (defaults["margin"], defaults["scale"])


# ----------------------------------------------------------------------------------------------------- how a run ends
@pytest.mark.parametrize("ends_with, code", [(None, 0), (trainer.Diverged(), 1),
                                             (trainer.Stopped(signal.SIGTERM), 143)])
def test_exit_codes(ends_with, code):
    def run():
        if ends_with:
            raise ends_with

    args = argparse.Namespace(device="cpu", cpu_threads=1, precision="fp32", seed=0)
    with pytest.raises(SystemExit) as end:
        trainer.run_training(args, run)
    assert end.value.code == code
