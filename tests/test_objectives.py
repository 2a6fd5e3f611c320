"""What train.py can learn from beside plain SimCSE, by the command line: pairs, triples, crops."""

import json

import pytest
from conftest import refuse, succeed
from training import ON, START, losses


@pytest.fixture(scope="module")
def texts(sample):
    return sample / "train_unsupervised.csv"


def test_pairs_then_triples_from_a_checkpoint(sample, tmp_path):
    """dev.csv as pairs: the loss falls; and with hard negatives of another query each, on from there."""
    result = succeed("train.py", *START, "--train_set_file", sample / "dev.csv", "--epochs", 5, "--save_dir", "pairs",
                     "--test_set_file", sample / "dev.csv", "--pooling", "mean", "--eval_steps", 4, cwd=tmp_path)
    assert "60 training pairs" in result.stderr and len(losses(result)) == 2
    recalls = [float(line.split("recall@10=")[1].split(",")[0]) for line in result.stdout.splitlines()]
    assert recalls[-1] > recalls[0] + 5, recalls
    lines = (sample / "dev.csv").read_text(encoding="utf-8").splitlines()
    triples = [f"{line}\t{other.split(chr(9))[1]}\n" for line, other in zip(lines, lines[1:] + lines[:1])]
    (tmp_path / "triples.csv").write_text("".join(triples), encoding="utf-8")
    result = succeed("train.py", *ON, "--train_set_file", "triples.csv", "--epochs", 3, "--init_from_ckpt",
                     tmp_path / "pairs" / "model_20", "--save_dir", "triples", cwd=tmp_path)
    assert "60 training triples" in result.stderr and losses(result)
    record = json.loads((tmp_path / "triples" / "model_12" / "simcse_config.json").read_text(encoding="utf-8"))
    assert record["pooling"] == "mean" and record["output_emb_size"] == 0


def test_columns_are_those_of_most_lines(texts, tmp_path):
    """A tab in the first line of a file of texts is a malformed line, and not a file of pairs."""
    (tmp_path / "t.csv").write_text("甲\t乙\n" + texts.read_text(encoding="utf-8"), encoding="utf-8")
    result = succeed("train.py", *START, "--train_set_file", "t.csv", "--epochs", 0, cwd=tmp_path)
    assert "t.csv:1 (columns: 2 instead of 1)" in result.stderr and "128 training texts" in result.stderr


def test_what_is_for_texts_refuses_pairs(sample, tmp_path):
    error = refuse("train.py", *START, "--train_set_file", sample / "dev.csv", "--crop_rate", 0.5, cwd=tmp_path)
    assert "--crop_rate" in error and "dev.csv has 2 columns" in error


def test_every_flag_of_the_loss_changes_it(texts, tmp_path):
    """16 steps of 8 texts each, dropout off: the same start, another loss at the tenth."""
    seen = {}
    start = [*START, "--train_set_file", texts, "--batch_size", 8, "--dropout", 0, "--output_dropout", 0,
             "--output_emb_size", 32, "--scale", 5]
    for name, flags in {"plain": [], "crop": ["--crop_rate", 0.5], "mean": ["--pooling", "mean"]}.items():
        tenth, _ = losses(succeed("train.py", *start, *flags, "--save_dir", name, cwd=tmp_path))
        seen[name] = float(tenth)
    assert len(set(seen.values())) == len(seen), seen
    assert seen["plain"] < seen["crop"]
