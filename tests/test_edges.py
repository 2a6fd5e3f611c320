"""Files that nobody means to give: what is done with them is defined, and never a traceback."""

import os

import numpy as np
import pytest
from conftest import ENCODER, FP32, refuse, run_script, succeed

EMPTY = {"empty": b"", "blank lines": b"\n \r\n\t\n\r", "a mark alone": b"\xef\xbb\xbf"}


def recall(checkpoint, tmp_path, corpus, **options):
    (tmp_path / "corpus.csv").write_bytes(corpus)
    (tmp_path / "dev.csv").write_text("问\t答\n", encoding="utf-8")
    return run_script("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", "corpus.csv",
                      "--similar_text_pair", "dev.csv", *FP32, cwd=tmp_path, **options)


def lines_of(tmp_path):
    text = (tmp_path / "recall_result_dir" / "recall_result.txt").read_bytes().decode("utf-8")
    return [line.split("\t") for line in text.split("\n")[:-1]]


@pytest.mark.parametrize("content", EMPTY.values(), ids=EMPTY)
def test_files_without_text(tmp_path, content):
    """Corpus, queries, training texts, pairs, results: one line that names flag and file, before anything is loaded."""
    (tmp_path / "model_state.pdparams").write_bytes(b"")
    for name in ("good.csv", "pairs.csv"):
        (tmp_path / name).write_text("a\n" if name == "good.csv" else "a\tb\n")
    (tmp_path / "bad.csv").write_bytes(content)
    model = ["--params_path", "."]
    for script, flag, more in (
            ("recall.py", "--corpus_file", [*model, "--similar_text_pair", "pairs.csv"]),
            ("recall.py", "--similar_text_pair", [*model, "--corpus_file", "good.csv"]),
            ("train.py", "--train_set_file", []), ("predict.py", "--text_pair_file", model),
            ("inference.py", "--input_file", model), ("evaluate.py", "--recall_result_file", [
                "--similar_text_pair", "pairs.csv"])):
        assert f"{flag} bad.csv: the file is empty" in refuse(script, flag, "bad.csv", *more, cwd=tmp_path)


def test_a_corpus_of_one_line_and_one_of_equal_texts(checkpoint, tmp_path):
    assert recall(checkpoint, tmp_path, "一句\n".encode()).returncode == 0
    assert [line[:2] for line in lines_of(tmp_path)] == [["问", "一句"]]
    assert recall(checkpoint, tmp_path, "同一句\n".encode() * 500).returncode == 0
    rows = lines_of(tmp_path)
    assert len(rows) == 10 and {tuple(row) for row in rows} == {tuple(rows[0])}


def test_training_on_equal_texts_and_on_one(checkpoint, tmp_path):
    """There would be no negatives, and the loss would be 0."""
    flags = ["--device", "cpu", "--model_name_or_path", ENCODER, "--train_set_file", "train.csv"]
    for content, what in (("同一句\n" * 80, "texts"), ("一句\n", "texts"), ("问\t甲\n问\t乙\n", "queries"),
                          ("问\t甲\n答\t甲\n", "titles")):
        (tmp_path / "train.csv").write_text(content, encoding="utf-8")
        line = f"train.py: error: --train_set_file train.csv: all {what} are the same; contrastive training needs"
        assert line in refuse("train.py", *flags, cwd=tmp_path)


def test_long_lines_nul_bytes_and_cr_alone(checkpoint, tmp_path):
    """100,000 characters are cut to the tokens that have room, NUL is a character that the tokenizer leaves out, and a
    line ends at CR."""
    corpus = "长" * 100_000 + "\r" + "a" * 100_000 + "\r" + "有\0空\0字符" + "\r" + "短"
    assert recall(checkpoint, tmp_path, corpus.encode()).returncode == 0
    assert {line[1] for line in lines_of(tmp_path)} == {"长" * 100_000, "a" * 100_000, "有\0空\0字符", "短"}
    (tmp_path / "texts").write_bytes("有\0空\0字符\n有空字符\n".encode())
    succeed("inference.py", "--device", "cpu", "--params_path", checkpoint, "--input_file", "texts", "--output_file",
            "v.npy", *FP32, cwd=tmp_path)
    same = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)


@pytest.mark.parametrize("content, line", [
    (b"\xed\xa0\x80", 1), (b"a\n\xff\xfeb\n", 2), (b"\xf4\x90\x80\x80", 1), (b"a\r\rb\r\n\xc0\x80", 4),
    (b"ok\n\xe4\xb8", 2)])
def test_what_is_not_utf8(checkpoint, tmp_path, content, line):
    """Lone surrogates, bytes of no character, overlong forms, and a file cut within a character."""
    result = recall(checkpoint, tmp_path, content)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"recall.py: error: --corpus_file corpus.csv:{line}: not UTF-8 at byte 1 of the line" in result.stderr


def test_bytes_that_are_no_text_on_the_command_line(checkpoint, tmp_path):
    for script, flag in (("inference.py", "--text"), ("recall.py", "--query")):
        line = refuse(script, flag, os.fsdecode(b"a\xff"), "--params_path", checkpoint, cwd=tmp_path)
        assert f"argument {flag}: not UTF-8: 'a\\udcff'" in line


@pytest.mark.parametrize("script, flags, message", [
    ("recall.py", ["--recall_num", 0], "argument --recall_num/--top_k: expected an integer >= 1, got '0'"),
    ("train.py", ["--seed", 10**20], f"argument --seed: expected an integer <= 2147483647, got '{10**20}'"),
    ("recall.py", ["--batch_size", -3], "argument --batch_size: expected an integer >= 1, got '-3'"),
    ("evaluate.py", ["--recall_num", 0], "argument --recall_num: expected an integer >= 1, got '0'"),
    ("train.py", ["--output_dropout", 1], "argument --output_dropout: expected a number in [0, 1), got '1'"),
    ("train.py", ["--margin", -1], "argument --margin: expected a number >= 0, got '-1'"),
    ("train.py", ["--warmup_proportion", 1.01], "--warmup_proportion: expected a number in [0, 1], got '1.01'"),
    ("train.py", ["--learning_rate", "inf"], "argument --learning_rate: expected a number > 0, got 'inf'"),
    ("train.py", ["--keep_checkpoints", -1], "argument --keep_checkpoints: expected an integer >= 0, got '-1'"),
    ("train.py", ["--max_grad_norm", 0], "argument --max_grad_norm: expected a number > 0, got '0'"),
    ("train.py", ["--max_seq_length", 514, "--model_name_or_path", ENCODER],
     "--max_seq_length 514: the encoder has 513 positions")])
def test_flags_out_of_range(tmp_path, script, flags, message):
    (tmp_path / "train.csv").write_text("a\n")
    needed = ["--train_set_file", "train.csv"] if script == "train.py" else []
    assert message in refuse(script, *needed, *flags, cwd=tmp_path)


def test_too_long_for_a_checkpoint_before_it_is_loaded(exported, checkpoint, tmp_path):
    for script, model in (("inference.py", ["--params_path", checkpoint]),
                          ("deploy/python/predict.py", ["--model_dir", exported])):
        line = refuse(script, *model, "--max_seq_length", 600, env={"PYTHONVERBOSE": ""}, cwd=tmp_path)
        assert "--max_seq_length 600: the encoder has 513 positions" in line and line.startswith(script.split("/")[-1])
