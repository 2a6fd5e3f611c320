"""Whitening, by its formula, by what it is fitted on, and by train.py --whiten."""

import argparse
import sys

import model as m
import train
from deploy.serving import opening
from simcse import flags
from simcse.console import InputError
from simcse.encoder import whitening
from simcse.encoder.encoder import Encoder
from simcse.encoder.pretrained import load_pretrained
from simcse.text import textfile, tokens, wordpiece
from simcse.text.prefixes import NO_PREFIXES

import numpy as np
import pytest
from conftest import ENCODER, refuse, succeed
from training import NAME, START, embeddings, weights


@pytest.fixture(scope="module")
def texts(sample):
    return sample / "train_unsupervised.csv"


def test_whitened_vectors_are_uncorrelated_and_of_one_variance():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((2000, 6)) @ random.standard_normal((6, 6)) + random.standard_normal(6)
    weight, bias = whitening.fit_whitening(vectors, 6, 0.0)
    white = vectors @ weight + bias
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(white.T @ white / 2000, np.eye(6), atol=1e-9)
    fewer = whitening.fit_whitening(vectors, 2, 0.0)
    np.testing.assert_allclose(fewer[0], weight[:, :2])
    np.testing.assert_allclose(fewer[1], bias[:2])
    variance = ((vectors - vectors.mean(axis=0)) @ np.linalg.pinv(weight).T).var(axis=0)
    assert (np.diff(variance) < 0).all(), "the directions of largest variance first"


@pytest.mark.parametrize("texts", [["天地玄黄,宇宙洪荒。日月盈昃" * 20] * 400, ["天地玄黄宇宙洪荒", "日月"] * 200,
                                   ["bidirectional transformers for language understanding " * 30] * 400, ["日"]])
def test_spans_are_of_all_lengths_and_none_is_cut(texts):
    """Of long texts and of short ones, of few letters a token and of many; as many lengths are short as are long."""
    tokenizer = wordpiece.load_tokenizer(str(ENCODER))
    found = whitening.cut_spans([f"{row}{text}" for row, text in enumerate(texts)], tokenizer, 64)
    lengths = np.array([len(ids) for ids in tokenizer(found, 512)])
    assert lengths.max() <= 64
    if len(texts) > 1:
        shares = np.histogram(lengths, [3, 15, 30, 65])[0] / len(lengths)
        assert len(found) > 0.8 * len(texts) and shares.min() > 0.25 and lengths.max() > 45


def test_fitted_on_documents_alone_it_recalls_for_queries(real_data):
    """Titles are short and abstracts long: whitened on abstracts as they are, 61 % of these titles recalled theirs."""
    pairs = textfile.read_text_pairs(str(real_data / "csl" / "recall" / "dev.csv"), "--file")[:100]
    network = m.SimCSE(load_pretrained(str(ENCODER), 0.1), pooling="first_last_avg")
    tokenizer = wordpiece.load_tokenizer(str(ENCODER))
    queries, documents = ([pair[side] for pair in pairs] for side in (0, 1))
    sample = documents + whitening.cut_spans(documents, tokenizer, 48)
    with whitening.unnormalized(network):
        embeddings_of_sample = Encoder(network, tokenizer, 48).encode(sample)
    whitening.whiten_network(network, embeddings_of_sample, 256, 48)
    query, title = (Encoder(network, tokenizer, 48).encode(texts) for texts in (queries, documents))
    assert ((query @ title.T).argmax(axis=1) == np.arange(100)).mean() > 0.68
    assert np.linalg.norm(query.mean(axis=0)) < 0.35, "queries all lie to one side"


def test_what_was_whitened_at_a_length_is_told_of_longer_texts(tmp_path, capsys):
    (tmp_path / "simcse_config.json").write_text('{"whitened_at": 64}', encoding="utf-8")
    parser = flags.ArgumentParser("whitens")
    for length, told in ((65, f"--max_seq_length 65: {tmp_path} was whitened at 64 tokens"), (64, ""), (32, "")):
        args = argparse.Namespace(params_path=str(tmp_path / NAME), max_seq_length=length, device="cpu",
                                  precision="auto", cpu_threads=0)
        flags.check_arguments(parser, args)
        lines = [line for line in capsys.readouterr().err.splitlines() if "whitened" in line]
        assert len(lines) == bool(told) and all(told in line for line in lines)


@pytest.mark.parametrize("more", [["--pooling", "first_avg"], ["--output_emb_size", 24, "--infer_with_fc_pooler"],
                                   ["--output_emb_size", 24]])
def test_a_whitened_checkpoint(texts, tmp_path, more):
    """Beside the trained one, which is as without --whiten; white on the training texts; in every stage."""
    words = ["train.py", *START, "--train_set_file", texts, *more]
    result = succeed(*words, "--save_dir", "white", "--whiten", 20, "--test_set_file", texts.parent / "dev.csv",
                     cwd=tmp_path)
    assert "global step 8, whitened, recall@1=" in result.stdout
    if more[0] == "--pooling":
        succeed(*words, "--save_dir", "plain", cwd=tmp_path)
        one, other = (weights(tmp_path / name / "model_8") for name in ("plain", "white"))
        assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    folder = tmp_path / "white" / "model_8_whitened"
    model, tokenizer, record = m.load_model(str(folder / NAME))
    assert record["output_emb_size"] == 20
    assert record["whitened_at"] == 16
    lines = list(dict.fromkeys(texts.read_text(encoding="utf-8").split("\n")[:-1]))
    model.normalizes = False
    white = Encoder(model, tokenizer, 16).encode(lines + whitening.cut_spans(lines, tokenizer, 16))
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-4)
    covariance = white.T @ white / len(white)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-3)
    assert np.diag(covariance).min() > 0.3 and np.diag(covariance).max() < 1.001, "one, but for the ridge"
    white = white[: len(lines)]
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    got = embeddings(folder, texts, tmp_path, "--output_emb_size", 20)
    rows = {line: row for row, line in enumerate(texts.read_text(encoding="utf-8").split("\n")[:-1])}
    np.testing.assert_allclose(got[[rows[line] for line in lines]], white, atol=1e-4)
    succeed("export_model.py", "--params_path", folder, "--output_path", "exported", cwd=tmp_path)
    where = argparse.Namespace(model_dir=str(tmp_path / "exported"), device="cpu", cpu_threads=0, precision=None)
    engine = opening.open_engine(where, "fp32", 10)
    assert type(engine).__name__ == ("TableEngine" if more[0] == "--pooling" else "PaddlePredictor")
    batch = tokens.pad(tokenizer(lines, 16), tokenizer.pad_token_id)
    np.testing.assert_allclose(engine.embed(*batch), white, atol=1e-4)


def test_whiten_to_more_than_there_is(texts, tmp_path):
    error = refuse("train.py", *START, "--train_set_file", texts, "--output_emb_size", 24, "--whiten", 30, cwd=tmp_path)
    assert "--whiten 30: embeddings have 24 dimensions" in error


# ---------------------------------------------------------------------------------------------- an fc of random numbers
@pytest.fixture
def build(monkeypatch, texts, tmp_path):
    """Makes the network that train.py whitens: build(*flags) -> flags, network, tokenizer, record."""
    def build_model(*more):
        words = [*START, "--train_set_file", texts, "--save_dir", tmp_path / "ck", *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        args = flags.resolve_training(train.parse_args())
        return args, *train.build_model(args)

    return build_model


def test_an_fc_that_is_not_trained_is_left_out(build, texts, capsys):
    """So the embeddings are those of as many directions without fc."""
    training_texts = textfile.TextFile(str(texts), "--flag")
    lines = training_texts.sample_texts(16)
    results = []
    for more in (["--output_emb_size", 24, "--whiten"], ["--output_emb_size", 32, "--whiten", 24],
                 ["--output_emb_size", 0, "--whiten", 24]):
        args, network, tokenizer, _ = build("--epochs", 0, "--pooling", "first_avg", *more)
        train.whiten_model(args, network, tokenizer, NO_PREFIXES, training_texts)
        assert network.embedding_size == network.output_emb_size == 24
        assert "fc_is_random" not in m.make_record(network, "encoder", 16)
        results.append(Encoder(network, tokenizer, 16).encode(lines, warn=False))
    for embeddings_of_lines in results[:-1]:
        np.testing.assert_array_equal(embeddings_of_lines, results[-1])
    line = ("--whiten: leaving out the fc, which has not been trained; whitening keeps 24 of the 256 dimensions before "
            "it\n")
    assert capsys.readouterr().err.count(line) == 2


def test_an_fc_counts_as_trained_from_the_first_epoch_on(build, tmp_path):
    """Whether a run trains it, or the checkpoint's record does not say that it is random."""
    _, network, tokenizer, record = build("--output_emb_size", 24, "--epochs", 0)
    assert network.fc_is_random and record["fc_is_random"]
    m.save_checkpoint(str(tmp_path / "untrained"), network, tokenizer, record)
    assert build("--init_from_ckpt", tmp_path / "untrained", "--epochs", 0)[1].fc_is_random
    _, network, tokenizer, record = build("--init_from_ckpt", tmp_path / "untrained", "--epochs", 1)
    assert not network.fc_is_random and "fc_is_random" not in record
    m.save_checkpoint(str(tmp_path / "trained"), network, tokenizer, record)
    assert not build("--init_from_ckpt", tmp_path / "trained", "--epochs", 0)[1].fc_is_random


def test_more_directions_than_there_are_before_an_fc_that_is_not_trained(build):
    flags_of_run = ["--epochs", 0, "--output_emb_size", 300, "--whiten"]
    with pytest.raises(InputError, match="--output_emb_size 300: .* before it have 256 dimensions; give at most 256"):
        build(*flags_of_run)
    build(*flags_of_run, 256)
