"""scripts/pretrain.py: masked words make an encoder."""

import subprocess
import time

import numpy as np
import pytest
from conftest import command, refuse, succeed
from training import ON, START, losses, weights


@pytest.fixture(scope="module")
def texts(sample):
    return sample / "train_unsupervised.csv"


def test_masked_words_make_an_encoder(texts, tmp_path):
    """The loss falls; the checkpoint is what --model_name_or_path takes; broken off and resumed it is the same."""
    mlm = ["scripts/pretrain.py", *START, "--train_set_file", texts, "--learning_rate", 5e-4, "--epochs", 5]
    result = succeed(*mlm, "--save_dir", "whole", cwd=tmp_path)
    told = list(map(float, losses(result)))
    assert len(told) == 4 and told[-1] < told[0] - 0.5, told
    assert "cls.predictions" in result.stderr and result.stderr.count("start at random") == 1
    whole = weights(tmp_path / "whole" / "model_40")
    process = subprocess.Popen(command(*mlm, "--save_dir", "broken", "--save_steps", 8), cwd=tmp_path)
    while not (tmp_path / "broken" / "model_16").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    succeed(*mlm, "--save_dir", "broken", "--resume", cwd=tmp_path)
    other = weights(tmp_path / "broken" / "model_40")
    assert whole.keys() == other.keys() and all((whole[name] == other[name]).all() for name in whole)
    succeed("train.py", *ON, "--model_name_or_path", tmp_path / "whole" / "model_40", "--train_set_file", texts,
            "--epochs", 0, "--pooling", "mean", "--save_dir", "simcse", cwd=tmp_path)
    made = weights(tmp_path / "simcse" / "model_0")
    name = "encoder.layers.0.linear1.weight"
    np.testing.assert_array_equal(made[f"ptm.{name}"], whole[f"ernie.{name}"])


def test_what_is_refused(texts, tmp_path):
    (tmp_path / "pairs.csv").write_text("甲\t乙\n" * 9, encoding="utf-8")
    for flags, message in ((["--train_set_file", texts, "--pooling", "mean"], "no such flag: --pooling"),
                           (["--train_set_file", texts, "--mlm_probability", 2], "a number in [0, 1], got '2'"),
                           (["--train_set_file", texts, "--resume", "nowhere"], "no checkpoint folder that training"),
                           (["--train_set_file", "pairs.csv"], "pairs.csv: 9 of 9 lines are malformed")):
        assert message in refuse("scripts/pretrain.py", *START, *flags, cwd=tmp_path)
