"""Whitening, by its formula and by train.py --whiten."""

import model as m
from simcse import whitening

import numpy as np
import pytest
from conftest import refuse, succeed
from training import NAME, START, embeddings, weights


@pytest.fixture(scope="module")
def texts(sample):
    return sample / "train_unsupervised.csv"


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
    result = succeed(*train, "--save_dir", "white", "--whiten", 20, "--test_set_file", texts.parent / "dev.csv",
                     cwd=tmp_path)
    assert "global step 8, whitened, recall@1=" in result.stdout
    if flags[0] == "--pooling":
        succeed(*train, "--save_dir", "plain", cwd=tmp_path)
        one, other = (weights(tmp_path / name / "model_8") for name in ("plain", "white"))
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    folder = tmp_path / "white" / "model_8_whitened"
    model, tokenizer, record = m.load_model(str(folder / NAME))
    assert record["output_emb_size"] == 20
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
