"""What train.py can learn from beside plain SimCSE, by the command line: pairs, crops, several sizes."""

import json

import numpy as np
import pytest
from conftest import refuse, succeed
from training import ON, START, embeddings, losses


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


@pytest.mark.parametrize("flags", [["--crop_rate", 0.5], ["--dup_rate", 0.3], ["--distill_from", "t.npy"],
                                   ["--objective", "mlm"]])
def test_what_is_for_texts_refuses_pairs(sample, tmp_path, flags):
    (tmp_path / "t.npy").write_bytes(b"")
    error = refuse("train.py", *START, "--train_set_file", sample / "dev.csv", *flags, cwd=tmp_path)
    assert f"--{flags[0].strip('-')}" in error and "dev.csv has 2 columns" in error


def test_every_flag_of_the_loss_changes_it(texts, tmp_path):
    """16 steps of 8 texts each, dropout off: the same start, another loss at the tenth."""
    seen = {}
    start = [*START, "--train_set_file", texts, "--batch_size", 8, "--dropout", 0, "--output_dropout", 0,
             "--output_emb_size", 32, "--scale", 5]
    for name, flags in {"plain": [], "dup": ["--dup_rate", 0.3], "crop": ["--crop_rate", 0.5], "dims":
                        ["--matryoshka_dims", "16,8"], "mean": ["--pooling", "mean"]}.items():
        (seen[name],) = map(float, losses(succeed("train.py", *start, *flags, "--save_dir", name, cwd=tmp_path)))
    assert len(set(seen.values())) == len(seen), seen
    assert seen["plain"] < seen["crop"]


def test_smaller_sizes_of_a_matryoshka_are_prefixes(texts, tmp_path):
    succeed("train.py", *START, "--train_set_file", texts, "--output_emb_size", 32, "--matryoshka_dims", "8,32,16",
            "--infer_with_fc_pooler", cwd=tmp_path)
    folder = tmp_path / "checkpoints" / "model_8"
    whole = embeddings(folder, texts, tmp_path)
    for size in (16, 8):
        part = whole[:, :size] / np.linalg.norm(whole[:, :size], axis=1, keepdims=True)
        np.testing.assert_allclose(embeddings(folder, texts, tmp_path, "--output_emb_size", size), part, atol=1e-5)
    recall = ["--device", "cpu", "--params_path", folder, "--query", "语义", "--index_path", "index"]
    succeed("recall.py", *recall, "--corpus_file", texts, cwd=tmp_path)
    assert "was built with another model" in refuse("recall.py", *recall, "--output_emb_size", 8, cwd=tmp_path)
    assert succeed("recall.py", *recall, "--output_emb_size", 32, cwd=tmp_path).stdout
    succeed("export_model.py", "--params_path", folder, "--output_path", "small", "--output_emb_size", 8, cwd=tmp_path)
    printed = succeed("deploy/python/predict.py", "--model_dir", "small", "--device", "cpu", "--text", "语义",
                      cwd=tmp_path).stdout
    assert printed.startswith("(1, 8)")
    error = refuse("inference.py", "--device", "cpu", "--params_path", folder, "--output_emb_size", 12)
    assert "--output_emb_size 12" in error and "has 32, 16, 8" in error
    for sizes, told in (("33", "no more than --output_emb_size is possible, which is 32"),
                        ("8,x", "'x' is not a whole number")):
        assert told in refuse("train.py", *START, "--train_set_file", texts, "--output_emb_size", 32,
                              "--matryoshka_dims", sizes, cwd=tmp_path)


