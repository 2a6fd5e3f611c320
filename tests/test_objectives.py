"""What train.py can learn from beside plain SimCSE, by the command line: pairs, masked words, a teacher, whitening."""

import json
import subprocess
import time

import numpy as np
import pytest
from conftest import ENCODER, FP32, command, refuse, succeed

import checkpoint as c
import loading
import model as m
import whitening

ON = ["--device", "cpu", "--batch_size", 16, "--max_seq_length", 16]
START = [*ON, "--model_name_or_path", ENCODER]
NAME = "model_state.pdparams"


def weights(folder):
    return c.read_weights(str(folder / NAME), "--flag")


def losses(result):
    return [float(line.split("loss: ")[1].split(",")[0]) for line in result.stderr.splitlines() if ", loss: " in line]


def embeddings(checkpoint, texts, cwd, *more):
    succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, "--input_file", texts, "--output_file",
            "v.npy", "--max_seq_length", 16, *FP32, *more, cwd=cwd)
    return np.load(cwd / "v.npy")


@pytest.fixture(scope="module")
def texts(sample):
    return sample / "train_unsupervised.csv"


# ------------------------------------------------------------------------------------------------------------- pairs
def test_pairs_then_triples_from_a_checkpoint(sample, tmp_path):
    """dev.csv as pairs: the loss falls; and with hard negatives of another query each, on from there."""
    result = succeed("train.py", *START, "--train_set_file", sample / "dev.csv", "--epochs", 5, "--save_dir", "pairs",
                     "--test_set_file", sample / "dev.csv", "--pooling", "mean", "--eval_steps", 1, cwd=tmp_path)
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


# --------------------------------------------------------------------------------------------------------- objectives
def test_every_flag_of_the_loss_changes_it(texts, tmp_path):
    """16 steps each, dropout off: the same start, another loss at the tenth."""
    seen = {}
    start = [*START, "--train_set_file", texts, "--epochs", 2, "--dropout", 0, "--output_dropout", 0,
             "--output_emb_size", 32, "--scale", 5]
    for name, flags in {"plain": [], "dup": ["--dup_rate", 0.3], "crop": ["--crop_rate", 0.5], "dims":
                        ["--matryoshka_dims", "16,8"], "mean": ["--pooling", "mean"]}.items():
        (seen[name],) = losses(succeed("train.py", *start, *flags, "--save_dir", name, cwd=tmp_path))
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


def test_a_teacher_is_followed(texts, tmp_path):
    """The student's similarities come closer to the teacher's than without it."""
    succeed("train.py", *START, "--train_set_file", texts, "--epochs", 0, "--pooling", "first_last_avg", "--whiten",
            "--save_dir", "teacher", cwd=tmp_path)
    teacher = embeddings(tmp_path / "teacher" / "model_0_whitened", texts, tmp_path)
    np.save(tmp_path / "teacher.npy", teacher)
    wanted = (teacher @ teacher.T)[np.triu_indices(len(teacher), 1)]
    agreement = {}
    for name, flags in (("without", []), ("with", ["--distill_from", "teacher.npy", "--distill_weight", 5])):
        succeed("train.py", *START, "--train_set_file", texts, "--epochs", 6, "--pooling", "mean", "--save_dir", name,
                "--learning_rate", 2e-4, *flags, cwd=tmp_path)
        own = embeddings(tmp_path / name / "model_48", texts, tmp_path)
        agreement[name] = np.corrcoef((own @ own.T)[np.triu_indices(len(own), 1)], wanted)[0, 1]
    assert agreement["with"] > agreement["without"] + 0.03, agreement
    np.save(tmp_path / "short.npy", teacher[1:])
    (tmp_path / "text.npy").write_text("not an array")
    for name, told in (("short.npy", "float32 [127, 256] instead of float32 [128, dimensions]"),
                       ("text.npy", "not an .npy file")):
        assert told in refuse("train.py", *START, "--train_set_file", texts, "--distill_from", name, cwd=tmp_path)


# ---------------------------------------------------------------------------------------------------------- whitening
def test_whitened_vectors_are_uncorrelated_and_of_one_variance():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((2000, 6)) @ random.standard_normal((6, 6)) + random.standard_normal(6)
    weight, bias = whitening.whitening(vectors, 6, 0.0)
    white = vectors @ weight + bias
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(white.T @ white / 2000, np.eye(6), atol=1e-9)
    fewer = whitening.whitening(vectors, 2, 0.0)
    np.testing.assert_allclose(fewer[0], weight[:, :2])
    np.testing.assert_allclose(fewer[1], bias[:2])
    variance = ((vectors - vectors.mean(axis=0)) @ np.linalg.pinv(weight).T).var(axis=0)
    assert (np.diff(variance) < 0).all(), "the directions of largest variance first"


@pytest.mark.parametrize("flags", [["--pooling", "mean"], ["--output_emb_size", 24, "--infer_with_fc_pooler"],
                                   ["--output_emb_size", 24]])
def test_a_whitened_checkpoint(texts, tmp_path, flags):
    """Beside the trained one, which is as without --whiten; white on the training texts; in every stage."""
    train = ["train.py", *START, "--train_set_file", texts, *flags]
    succeed(*train, "--save_dir", "plain", cwd=tmp_path)
    result = succeed(*train, "--save_dir", "white", "--whiten", 20, "--test_set_file", texts.parent / "dev.csv",
                     cwd=tmp_path)
    assert "global step 8, whitened, recall@1=" in result.stdout
    one, other = (weights(tmp_path / name / "model_8") for name in ("plain", "white"))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    folder = tmp_path / "white" / "model_8_whitened"
    model, tokenizer, record = loading.load_model(str(folder / NAME))
    assert record["matryoshka_dims"] == [20, 10, 5, 2] and record["output_emb_size"] == 20
    lines = list(dict.fromkeys(texts.read_text(encoding="utf-8").split("\n")[:-1]))
    model.normalizes = False
    white = m.encode(model, tokenizer, lines, 16)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    covariance = white.T @ white / len(white)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)
    assert np.diag(covariance).min() > 0.3 and np.diag(covariance).max() < 1.001, "one, but for the ridge"
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    got = embeddings(folder, texts, tmp_path, "--output_emb_size", 20)
    rows = {line: row for row, line in enumerate(texts.read_text(encoding="utf-8").split("\n")[:-1])}
    np.testing.assert_allclose(got[[rows[line] for line in lines]], white, atol=1e-4)
    succeed("export_model.py", "--params_path", folder, "--output_path", "exported", cwd=tmp_path)


def test_whiten_to_more_than_there_is(texts, tmp_path):
    error = refuse("train.py", *START, "--train_set_file", texts, "--output_emb_size", 24, "--whiten", 30, cwd=tmp_path)
    assert "--whiten 30: embeddings have 24 numbers" in error


# -------------------------------------------------------------------------------------------------------- masked words
def test_masked_words_make_an_encoder(texts, tmp_path):
    """The loss falls; the checkpoint is what --model_name_or_path takes; broken off and resumed it is the same."""
    mlm = ["train.py", *START, "--objective", "mlm", "--train_set_file", texts, "--learning_rate", 5e-4, "--epochs", 5]
    result = succeed(*mlm, "--save_dir", "whole", cwd=tmp_path)
    told = losses(result)
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


@pytest.mark.parametrize("flags", [["--pooling", "mean"], ["--crop_rate", 0.3], ["--test_set_file", "t.csv"],
                                   ["--whiten"], ["--gradient_cache"]])
def test_flags_of_the_other_objective(texts, tmp_path, flags):
    (tmp_path / "t.csv").write_text("甲\t乙\n", encoding="utf-8")
    error = refuse("train.py", *START, "--train_set_file", texts, "--objective", "mlm", *flags, cwd=tmp_path)
    assert f"{flags[0]} is not for --objective mlm" in error
    for more, needs in ((["--mlm_probability", 0.2], "--objective mlm"), (["--distill_weight", 2], "--distill_from")):
        error = refuse("train.py", *START, "--train_set_file", texts, *more, cwd=tmp_path)
        assert f"{more[0]} needs {needs}" in error
