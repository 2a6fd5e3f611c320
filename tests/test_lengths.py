"""Which length a stage cuts texts at, what it says of them, and that what an encoder cannot see is nobody's match."""

import argparse
import json
import re
import sys
from types import SimpleNamespace

import train
from deploy.python import encoder as deployed
from simcse import console, flags
from simcse.console import InputError
from simcse.encoder import encoder
from simcse.encoder.encoder import Encoder, tokenize_rows, warn_unusable
from simcse.encoder.weights import CheckpointFiles
from simcse.text import textfile, wordpiece
from simcse.text.prefixes import NO_PREFIXES
from simcse.training import trainer

import numpy as np
import pytest
from conftest import ENCODER, ROOT

UNSEEN = ["😀😀", "👍!", "สวัสดี ครับ", "\u200b", "한국어。"]


@pytest.fixture(scope="module")
def tokenizer():
    return wordpiece.load_tokenizer(str(ENCODER))


class Ones:
    """An engine to which all texts are alike."""

    embedding_size, max_positions, batch_tokens, max_batch_size, precision = 4, 512, 2048, None, "fp32"

    def embed(self, input_ids, token_type_ids):
        assert input_ids.shape[1] <= 8
        return np.full((len(input_ids), 4), 0.5, "float32")


def encoder_of(tokenizer):
    return Encoder(Ones(), tokenizer, 8)


# -------------------------------------------------------------------------------------------------------- the default
@pytest.mark.parametrize("recorded, given, length, said", [
    (48, None, 48, False), (48, 48, 48, False), (48, 60, 60, True), (None, None, 64, False), (None, 60, 60, False)])
def test_the_recorded_length_is_the_default_and_another_is_said(tmp_path, capsys, recorded, given, length, said):
    (tmp_path / "model_state.pdparams").touch()
    (tmp_path / "simcse_config.json").write_text(json.dumps({"max_seq_length": recorded}))
    words = ["--device", "cpu", "--params_path", str(tmp_path)] + ["--max_seq_length", str(given)] * bool(given)
    parser = flags.ArgumentParser("A stage.")
    flags.add_model_arguments(parser)
    flags.add_encode_arguments(parser)
    args = parser.parse_args(words)
    flags.set_max_seq_length(args)
    flags.check_arguments(parser, args)
    assert args.max_seq_length == length
    assert capsys.readouterr().err == said * (
        f"--max_seq_length {given}: {tmp_path} was trained with {recorded}; embeddings of texts that are cut differ\n")


def test_training_goes_on_at_the_length_of_its_start(tmp_path, monkeypatch):
    (tmp_path / "model_state.pdparams").touch()
    (tmp_path / "simcse_config.json").write_text('{"max_seq_length": 48}')
    (tmp_path / "train.csv").write_text("甲\n乙\n", encoding="utf-8")
    for more, length in (([], 128), (["--init_from_ckpt", str(tmp_path)], 48), (["--max_seq_length", "60"], 60)):
        monkeypatch.setattr("sys.argv", ["train.py", "--device", "cpu", "--train_set_file",
                                         str(tmp_path / "train.csv"), *more])
        assert train.parse_args().max_seq_length == length


@pytest.mark.parametrize("script", ["run_build_index", "predict"])
def test_the_scripts_leave_the_length_to_the_checkpoint(script):
    text = (ROOT / "scripts" / f"{script}.sh").read_text()
    assert '${MAX_SEQ_LENGTH:+--max_seq_length "$MAX_SEQ_LENGTH"}' in text and text.count("--max_seq_length") == 1


# --------------------------------------------------------------------------------------------- what is cut, or not seen
def test_cut_texts_are_counted(tokenizer, tmp_path, capsys):
    """A text of as many tokens as there is room for is not cut; places are those of lines, blank ones counted."""
    (tmp_path / "t.csv").write_text("六个汉字的长\n\n七个汉字的长短\n短\nabc " + "长" * 900 + "\n", encoding="utf-8")
    texts = textfile.TextFile(str(tmp_path / "t.csv"), "--flag")
    assert encoder_of(tokenizer).encode(texts).shape == (4, 4)
    assert capsys.readouterr().err == (f"2 of 4 texts are longer than 8 tokens and cut; raise --max_seq_length, "
                                       "in training too, to encode more of them: "
                                       f"{tmp_path}/t.csv:3, {tmp_path}/t.csv:5\n")
    assert encoder_of(tokenizer).encode(texts, warn=False).all() and not capsys.readouterr().err


def test_a_cut_text_keeps_its_first_tokens(tokenizer):
    texts = ["长" * 30, "abc def " * 9, "六个汉字的长", "短"]
    assert encoder_of(tokenizer).tokenize(texts).ids == tokenizer(texts, 8)


def test_strict_data_refuses_them(tokenizer, monkeypatch):
    monkeypatch.setattr(console.settings, "strict_data", True)
    for text, message in (("长" * 9, "1 of 2 texts is longer than 8 .*'长长长长长长长长长'"),
                          ("👍", "1 of 2 texts is all .UNK.")):
        with pytest.raises(InputError, match=message + r".* \(--strict_data\)"):
            encoder_of(tokenizer).encode(["短", text])


def test_texts_that_the_encoder_does_not_see_are_like_none(tokenizer, capsys):
    """[UNK] and no word besides, or no token at all: zeros, whose cosine with any text, each other's too, is 0."""
    texts = ["语义", *UNSEEN, "👍1", "。。", "语👍"]
    assert wordpiece.find_unknown(tokenizer, tokenizer(texts, 8)) == [1, 2, 3, 4, 5]
    embeddings = encoder_of(tokenizer).encode(texts)
    assert embeddings.any(axis=1).tolist() == [True, *[False] * 5, True, True, True]
    first, second = encoder_of(tokenizer).encode_pairs([("👍", "👍"), ("短", "短")])
    assert (first * second).sum(axis=1).tolist() == [0, 1]
    said = "5 of 9 texts are all .UNK. to the encoder.*: '😀😀', '👍!', 'สวัสดี ครับ'\n2 of 4 texts"
    assert re.match(said, capsys.readouterr().err)


def test_nor_are_they_to_a_service_or_a_server(tokenizer, tmp_path, capsys):
    from deploy.serving.jobs import Input
    from deploy.serving.searcher import Searcher
    from deploy.serving.shapes import BatchShapes

    searcher = Searcher(encoder_of(tokenizer), None, SimpleNamespace(line_count=0), BatchShapes([1, 4], [8]))
    embeddings, _ = searcher.encode([Input(text, "document") for text in ["语义", *UNSEEN]])
    assert embeddings.any(axis=1).tolist() == [True, *[False] * 5]
    assert not capsys.readouterr().err
    for _ in range(2):
        long_texts = [Input("长" * 9, "query"), Input("长" * 5, "query")]
        assert searcher.encode(long_texts)[1].tolist() == [9, 7]  # one more than are seen
    assert capsys.readouterr().err == "texts longer than 8 tokens are cut; further ones are not reported\n"
    tokenizer.save_rust(str(tmp_path))
    encoded = deployed.encode(Ones(), deployed.Tokenizer(str(tmp_path)), ["语义", *UNSEEN, "长" * 9], 8)
    assert encoded.embeddings.any(axis=1).tolist() == [True, *[False] * 5, True]
    assert (encoded.truncated, encoded.unknown) == ([6], [1, 2, 3, 4, 5])


def test_the_graph_finds_its_way_past_zeros():
    """Documents that are not seen neither hide the others nor stand before them."""
    from simcse.index.exact import exact_search
    from simcse.index.hnsw import HnswEngine

    vectors = np.random.default_rng(0).standard_normal((2000, 16)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[::2] = 0
    index = HnswEngine(16, 2000, {"hnsw_m": 32, "hnsw_ef": 100})
    index.add(vectors)
    found, exact = index.search(vectors[1:200:2], 10, 1).rows, exact_search(vectors[1:200:2], vectors, 10)[0]
    assert (found == exact).mean() > 0.99 and (found % 2 == 1).all()


# ------------------------------------------------------------------------------------------------ training, evaluation
def arguments(path, **changed):
    return argparse.Namespace(**{"train_set_file": str(path), "test_set_file": str(path), "max_seq_length": 8,
                                 "batch_size": 8, "cross_device_negatives": False, "save_best": False,
                                 "early_stopping": None, **changed})


def test_training_texts_that_are_one_after_cutting(tokenizer, tmp_path, capsys):
    """Of pairs a line is said where either of its texts is such a one."""
    path = tmp_path / "train.csv"
    path.write_text("".join(f"承担单位见附件{row}\n" for row in range(5)) + "别的\n别的\n", encoding="utf-8")
    warn_unusable(tokenize_rows(textfile.TextFile(str(path), "--flag").sample_rows(9), tokenizer, 8), 8)
    cut, alike = capsys.readouterr().err.splitlines()
    assert cut.startswith("5 of 7 texts are longer than 8 tokens")
    assert alike == ("4 of 7 texts are the same as another text once cut to 8 tokens; raise "
                     f"--max_seq_length to tell them apart: {path}:2, {path}:3, {path}:4")
    path.write_text("".join(f"问题{row}\t承担单位见附件{row}\n" for row in "甲乙"), encoding="utf-8")
    warn_unusable(tokenize_rows(textfile.TextFile(str(path), "--flag", columns=2).sample_rows(9), tokenizer, 8), 8)
    said = capsys.readouterr().err.splitlines()[1]
    assert said.startswith("1 of 4 texts is the same as another text") and said.endswith(f" {path}:2")


def test_texts_that_are_one_to_the_encoder_are_no_training(tokenizer, tmp_path, capsys):
    """All [UNK], or alike but for case and blanks; of pairs the titles."""
    path = tmp_path / "train.csv"
    for content, name in (("😀\n😀😀\n👍\n", "texts"), ("Hello 你好\nhello  你好\nＨ\n", "texts"),
                          ("甲\tX\n乙\tx\n", "titles")):
        path.write_text(content, encoding="utf-8")
        texts = textfile.TextFile(str(path), "--flag", 1 if name == "texts" else 2)
        with pytest.raises(InputError, match=f"train.csv: all {name} are the same to the encoder; contrastive"):
            train.check_texts_as_encoded(arguments(path, epochs=1, whiten=None), texts, [], tokenizer, NO_PREFIXES)
        train.check_texts_as_encoded(arguments(path, epochs=0, whiten=None), texts, [], tokenizer, NO_PREFIXES)
        if name == "texts":
            with pytest.raises(InputError, match="train.csv: all texts are the same to the encoder; --whiten"):
                train.check_texts_as_encoded(arguments(path, epochs=0, whiten=0), texts, [], tokenizer, NO_PREFIXES)
        else:  # whitening reads queries and titles alike, and the queries differ
            train.check_texts_as_encoded(arguments(path, epochs=0, whiten=0), texts, [], tokenizer, NO_PREFIXES)
    path.write_text("承担单位见附件一\n承担单位见附件二\n", encoding="utf-8")  # they are but cut, which is warned of
    texts = textfile.TextFile(str(path), "--flag")
    train.check_texts_as_encoded(arguments(path, epochs=1, whiten=None), texts, [], tokenizer, NO_PREFIXES)
    assert "1 of 2 texts is the same as another text" in capsys.readouterr().err


def test_embeddings_that_are_no_numbers_are_refused(tokenizer, tmp_path):
    class Nan(Ones):
        def embed(self, input_ids, token_type_ids):
            return np.full((len(input_ids), 4), np.nan, "float32")

    with pytest.raises(InputError, match="^embeddings contain NaN or Inf"):
        Encoder(Nan(), tokenizer, 8).encode(["短"])
    weights = tmp_path / "model_state.pdparams"
    weights.touch()
    with pytest.raises(InputError, match="^--params_path .*/model_state.pdparams: embeddings contain NaN or Inf"):
        Encoder(Nan(), tokenizer, 8, checkpoint=CheckpointFiles(str(weights))).encode(["短"])


def test_ranks_count_together(tokenizer, monkeypatch, capsys):
    """Each has its part of the texts; the first says what all have seen."""
    texts, parts = ["长" * 9, "短", "👍", "长" * 8], []
    monkeypatch.setattr(encoder, "gather_arrays", lambda array: parts.append(array) or parts)
    for rows in (range(2, 4), range(2)):
        warnings = encoder.TextWarnings(8)
        warnings.add(encoder_of(tokenizer).tokenize([texts[row] for row in rows]), rows)
        assert not capsys.readouterr().err
        warnings = warnings.gather()
    warnings.report(str)
    assert [line.split(":")[-1] for line in capsys.readouterr().err.splitlines()] == [" 0, 3", " 2"]
    assert warnings.total == 4


def test_a_batch_of_one_is_warned_about(tmp_path, capsys):
    path = tmp_path / "train.csv"
    path.write_text("甲\n乙\n", encoding="utf-8")
    train.check_negatives(arguments(path, batch_size=1), textfile.TextFile(str(path), "--flag"))
    assert "batches of one text have no negatives" in capsys.readouterr().err
    train.check_negatives(arguments(path), textfile.TextFile(str(path), "--flag"))
    assert not capsys.readouterr().err


def test_whitening_without_training_needs_no_negatives(tmp_path, capsys, monkeypatch):
    path = tmp_path / "train.csv"
    path.write_text("问\t甲\n问\t乙\n", encoding="utf-8")
    words = ["train.py", "--device", "cpu", "--train_set_file", str(path), "--batch_size", "1", "--whiten", "--epochs"]
    started = []
    monkeypatch.setattr(trainer, "run_training", lambda args, train: started.append(args.epochs))
    monkeypatch.setattr(sys, "argv", [*words, "1"])
    with pytest.raises(InputError, match="train.csv: all queries are the same; contrastive training needs"):
        train.main()
    monkeypatch.setattr(sys, "argv", [*words, "0"])
    train.main()
    assert started == [0] and "no negatives" not in capsys.readouterr().err


def test_a_measure_that_is_undefined_says_why(tmp_path, capsys):
    path = tmp_path / "test.csv"
    path.write_text("甲\t乙\t1\n丙\t丁\t1\n", encoding="utf-8")
    assert train.read_test_set(arguments(path)) == []
    assert "every label is 1, of which Spearman's rho is undefined" in capsys.readouterr().err
    pairs = [("甲", "乙", "1"), ("丙", "丁", "0")]
    assert train.evaluate(lambda texts, input_type: np.ones((len(texts), 2)), pairs) == {}
    assert capsys.readouterr().err == "spearman is undefined: every cosine is 2\n"


def test_targets_that_only_a_program_tells_apart(tmp_path, capsys):
    path = tmp_path / "dev.csv"
    path.write_text("问\t甲？\n答\t甲?\n又\t\u200b甲 ？\n再\t乙\n三\t乙\n", encoding="utf-8")
    assert len(train.read_test_set(arguments(path))) == 5
    assert capsys.readouterr().err == (
        "--test_set_file: 2 of 5 targets match an earlier one after Unicode and white-space normalization, and "
        f"count as another document; write them alike: {path}:2, {path}:3\n")


def test_targets_that_the_corpus_lacks(tmp_path, capsys):
    """Counted once each, named where they first stand; those that are there but for what nobody sees."""
    import recall

    (tmp_path / "corpus.csv").write_text("甲？\n\ufeff乙 丙\n丁\n", encoding="utf-8")
    corpus = textfile.Corpus(str(tmp_path / "corpus.csv"), "--corpus_file")

    def check(*targets):
        args = SimpleNamespace(similar_text_pair="dev.csv", targets="text")
        pairs = [textfile.Row(number, ["问", target]) for number, target in enumerate(targets, 1)]
        recall.warn_missing_targets(args, pairs, corpus)
        return capsys.readouterr().err

    assert check("丁", "乙 丙", "甲？") == ""
    assert check("丁", "\u200b丁", "乙丙", "甲?", "戊", "戊") == (
        f"--similar_text_pair: 4 of 5 targets are not in {corpus.path}, and count as missed; 3 of them match a "
        "document after Unicode and white-space normalization: dev.csv:2, dev.csv:3, dev.csv:4\n")
