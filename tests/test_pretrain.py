"""scripts/pretrain.py: masked words make an encoder."""

import subprocess
import time

from simcse.text.wordpiece import load_tokenizer
from simcse.training.masked_lm import load_masked_lm

import numpy as np
import pytest
from conftest import command, refuse, succeed
from hugging_face_models import TEXTS, VOCABULARY, weights_with_head, write_model
from safetensors.numpy import save_file
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


def test_an_encoder_in_the_layout_of_hugging_face(tmp_path):
    """Its head is trained on; what is saved is an encoder in PaddleNLP's layout, with the same tokens."""
    write_model(tmp_path / "bert", "bert")
    save_file(weights_with_head("bert"), str(tmp_path / "bert" / "model.safetensors"))
    (tmp_path / "texts.csv").write_text("".join(f"{text}\n" for text in TEXTS * 8), encoding="utf-8")
    start = ["--model_name_or_path", tmp_path / "bert", "--train_set_file", "texts.csv"]
    result = succeed("scripts/pretrain.py", *ON, *start, "--learning_rate", 5e-3, "--epochs", 10, cwd=tmp_path)
    assert "bert in the layout of Hugging Face" in result.stderr and "at random" not in result.stderr
    first, *_, last = map(float, losses(result))
    assert last < first - 0.3
    saved = tmp_path / "checkpoints" / "model_20"
    assert load_tokenizer(str(saved))(TEXTS, 16) == load_tokenizer(str(tmp_path / "bert"))(TEXTS, 16)
    state = load_masked_lm(str(saved), dropout=0.0).network.state_dict()
    assert {name: tensor.numpy().tolist() for name, tensor in state.items()} == {
        name: array.tolist() for name, array in weights(saved).items()}, "as --resume reads it"
    succeed("train.py", *ON, "--model_name_or_path", saved, "--train_set_file", "texts.csv", "--epochs", 0,
            "--pooling", "mean_all", "--save_dir", "simcse", cwd=tmp_path)
    name = "encoder.layers.0.linear1.weight"
    made = weights(tmp_path / "simcse" / "model_0")
    np.testing.assert_array_equal(made[f"ptm.{name}"], weights(saved)[f"bert.{name}"])

    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(token.replace("[MASK]", "x") for token in VOCABULARY),
                                                 encoding="utf-8")
    line = refuse("scripts/pretrain.py", *ON, *start, "--save_dir", "none", cwd=tmp_path)
    assert "--model_name_or_path: the encoder's vocabulary has no [MASK]; name another one" in line


def test_what_is_refused(texts, tmp_path):
    (tmp_path / "pairs.csv").write_text("甲\t乙\n" * 9, encoding="utf-8")
    for flags, message in ((["--train_set_file", texts, "--pooling", "mean"], "no such flag: --pooling"),
                           (["--train_set_file", texts, "--mlm_probability", 2], "a number in [0, 1], got '2'"),
                           (["--train_set_file", texts, "--resume", "nowhere"], "no checkpoint folder that training"),
                           (["--train_set_file", "pairs.csv"], "pairs.csv: 9 of 9 lines are malformed")):
        assert message in refuse("scripts/pretrain.py", *START, *flags, cwd=tmp_path)
