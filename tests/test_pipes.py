"""Lines of stdin, answered as they come, and results as tab-separated or JSON lines."""

import json
import re
import signal
import subprocess

import numpy as np
import pytest
from conftest import FP32, command, refuse, succeed

CPU = ["--device", "cpu", "--cpu_threads", 1, *FP32]
GBK = "语义索引".encode("gbk")


@pytest.fixture(scope="module")
def commands(checkpoint, sample, tmp_path_factory):
    """What answers a line of stdin in each script; the index is kept, so that it is built once."""
    index = tmp_path_factory.mktemp("index") / "index"
    recall = ["recall.py", *CPU, "--params_path", checkpoint, "--index_path", index, "--ann_engine", "exact",
              "--top_k", 3]
    succeed(*recall, "--corpus_file", sample / "corpus.csv", "--query", "语义检索")
    return {"recall": [*recall, "--query"],
            "inference": ["inference.py", *CPU, "--params_path", checkpoint, "-"],
            "predict": ["predict.py", *CPU, "--params_path", checkpoint, "-"]}


def lines_for(name):
    end = "\t语义搜索" if name == "predict" else ""
    return [f"第{row}条 语义 检索{'，长一些' * row}{end}" for row in range(7)]


def start(script, *args, **options):
    return subprocess.Popen(command(script, *args), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def pipe(content, script, *args):
    """stdout, stderr and exit code of a script that gets `content` on stdin."""
    with start(script, *args) as process:
        out, err = process.communicate(content, timeout=300)
    assert b"Traceback" not in err and b"Fatal" not in err, err
    return out.decode(), err.decode(), process.returncode


def piped(lines, *command):
    """The lines that a script answers `lines` with."""
    out, err, code = pipe("".join(f"{line}\n" for line in lines).encode(), *command)
    assert code == 0, err
    assert "encoding" not in err, "no progress beside answers"
    return out.splitlines()


def split(answers, form):
    """Texts and numbers of the lines of inference.py and predict.py, as lists."""
    if form == "jsonl":
        rows = [list(json.loads(line).values()) for line in answers]
        return [row[:-1] for row in rows], np.array([row[-1] for row in rows])
    rows = [line.split("\t") for line in answers]
    return [row[:-1] for row in rows], np.array([list(map(float, row[-1].split())) for row in rows]).squeeze()


@pytest.mark.parametrize("name, flag", [("inference", "--input_file"), ("predict", "--text_pair_file")])
def test_stdin_is_answered_as_a_file_is(commands, tmp_path, name, flag):
    """Tab-separated and JSON: the same numbers to the bit of a file, and but for the last digits of stdin, where other
    lines are batched together."""
    lines, command = lines_for(name), commands[name]
    (tmp_path / "lines").write_text("\n".join(lines), encoding="utf-8")
    by_flag = [*command[:-1], flag, tmp_path / "lines"]
    texts, numbers = split(succeed(*by_flag, "--format", "tsv").stdout.splitlines(), "tsv")
    assert texts == [line.split("\t") for line in lines] and len(numbers) == 7
    same_texts, same_numbers = split(succeed(*by_flag, "--format", "jsonl").stdout.splitlines(), "jsonl")
    assert same_texts == texts and (same_numbers == numbers).all()
    for form in ("tsv", "jsonl"):
        of_stdin = split(piped(lines, *command, "--format", form), form)
        assert of_stdin[0] == texts
        np.testing.assert_allclose(of_stdin[1], numbers, atol=1e-6)
    if name == "predict":
        assert list(map(float, succeed(*by_flag).stdout.split())) == numbers.tolist(), "the cosines alone"


def test_formats_of_an_exported_folder(commands, exported, tmp_path):
    (tmp_path / "texts").write_text("\n".join(lines_for("inference")), encoding="utf-8")
    (tmp_path / "pairs").write_text("\n".join(lines_for("predict")), encoding="utf-8")
    files = [("--input_file", tmp_path / "texts"), ("--text_pair_file", tmp_path / "pairs")]
    tsv, jsonl = (succeed("deploy/python/predict.py", *CPU, "--model_dir", exported, *files[0], *files[1], "--format",
                          form).stdout.splitlines() for form in ("tsv", "jsonl"))
    assert len(tsv) == len(jsonl) == 14
    assert list(json.loads(jsonl[0])) == ["text", "embedding"]
    assert list(json.loads(jsonl[-1])) == ["query", "title", "cosine"]
    for part, name, (flag, path) in ((slice(7), "inference", files[0]), (slice(7, 14), "predict", files[1])):
        texts, numbers = split(tsv[part], "tsv")
        same_texts, same_numbers = split(jsonl[part], "jsonl")
        assert texts == same_texts and (numbers == same_numbers).all()
        of_checkpoint = split(succeed(*commands[name][:-1], flag, path, "--format", "tsv").stdout.splitlines(), "tsv")
        assert of_checkpoint[0] == texts
        np.testing.assert_allclose(of_checkpoint[1], numbers, atol=1e-6)


def test_white_space_in_a_given_text_is_a_blank(commands, exported):
    given, plain = " 怎么办\t护照\r\n需要\x85什么\u2028材料 ", "怎么办 护照 需要 什么 材料"
    deployed = ["deploy/python/predict.py", *CPU, "--model_dir", exported, "--format", "tsv", "--text"]
    for words in ([*commands["inference"][:-1], "--format", "tsv", "--text"], deployed, commands["recall"]):
        lines = succeed(*words, given, words[-1], plain).stdout.splitlines()
        assert lines and {line.split("\t")[0] for line in lines} == {plain}
        assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_recall_results(commands, checkpoint, sample, tmp_path):
    """The result file and stdin, in both formats: one ranking."""
    queries = lines_for("recall")
    (tmp_path / "pairs").write_text("".join(f"{query}\tx\n" for query in queries), encoding="utf-8")
    parsed = []
    for form in ("tsv", "jsonl"):
        file = ["--similar_text_pair", tmp_path / "pairs", "--corpus_file", sample / "corpus.csv", "--format", form]
        succeed(*commands["recall"][:-1], *file, cwd=tmp_path)
        written = (tmp_path / "recall_result_dir" / "recall_result.txt").read_text(encoding="utf-8").splitlines()
        dash = ["-"] * (form == "jsonl")
        for answers in (written, piped(queries, *commands["recall"], *dash, "--format", form)):
            if form == "jsonl":
                found = [json.loads(line) for line in answers]
                assert [each["query"] for each in found] == queries
                assert all([hit["rank"] for hit in each["results"]] == [1, 2, 3] for each in found)
                parsed.append([(each["query"], hit["document"], hit["cosine"]) for each in found
                               for hit in each["results"]])
            else:
                parsed.append([(query, document, float(cosine)) for query, document, cosine in
                               (line.split("\t") for line in answers)])
    documents = set((sample / "corpus.csv").read_text(encoding="utf-8").splitlines())
    assert len(parsed[0]) == 21 and {document for _, document, _ in parsed[0]} <= documents
    for other in parsed[1:]:
        assert [row[:2] for row in other] == [row[:2] for row in parsed[0]]
        np.testing.assert_allclose([row[2] for row in other], [row[2] for row in parsed[0]], atol=1e-6)


@pytest.mark.parametrize("name, flag, form, bad", [
    ("inference", "--input_file", "jsonl", ["", "  ", "\u3000", "发\t票"]),
    ("predict", "--text_pair_file", "tsv", ["", "\t", "只有一列", "甲\t乙\t丙", "空\t"])])
def test_a_line_of_output_a_line_of_input(commands, exported, tmp_path, name, flag, form, bad):
    """A blank line and a malformed one, of files and of stdin: NaN, an empty field, null; the others have what they
    have without these, and so has the loss."""
    lines = lines_for(name)
    mixed = [line for pair in zip(lines, bad) for line in pair] + lines[len(bad):]
    good = [mixed.index(line) for line in lines]
    (tmp_path / "lines").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "mixed").write_text("\n".join(mixed), encoding="utf-8")
    deployed = ["deploy/python/predict.py", *CPU, "--model_dir", exported]
    for words in ([*commands[name][:-1], flag], [*deployed, flag]):
        expected = succeed(*words, tmp_path / "lines", "--format", form)
        answers = succeed(*words, tmp_path / "mixed", "--format", form)
        found = answers.stdout.splitlines()
        assert len(found) == len(mixed)
        assert f"{len(bad)} of {len(mixed)} lines are blank or malformed: " in answers.stderr
        texts, numbers = split([found[row] for row in good], form)
        same, wanted = split(expected.stdout.splitlines(), form)
        assert texts == same
        np.testing.assert_allclose(numbers, wanted, atol=1e-6)
        assert all(found[row].endswith("\t" if form == "tsv" else ": null}") == (row not in good)
                   for row in range(len(mixed)))
        last = [re.sub(r"\S+/(lines|mixed):\d+", "", ran.stderr.splitlines()[-1]) for ran in (expected, answers)]
        assert last[0] == last[1], "the loss, or what is cut"
        assert "mixed:2: blank (--strict_data)" in refuse(*words, tmp_path / "mixed", "--strict_data")
        if name == "predict":
            cosines = [float(line) for line in succeed(*words, tmp_path / "mixed").stdout.splitlines()]
            holds = np.isfinite(cosines)
        else:
            succeed(*words, tmp_path / "mixed", "--output_file", tmp_path / "v.npy")
            holds = np.isfinite(np.load(tmp_path / "v.npy")).all(axis=1)
        assert np.flatnonzero(holds).tolist() == good
    assert len(piped(bad + lines[:1], *commands[name])) == len(bad) + 1, "more are bad, and each was answered"


@pytest.mark.parametrize("name", ["recall", "inference", "predict"])
def test_a_line_is_answered_before_the_next_is_written(commands, name):
    """And one that is blank or malformed too; it is reported then, and at the end."""
    with start(*commands[name], *([] if name == "predict" else ["--format", "jsonl"])) as process:
        for line in lines_for(name)[:3]:
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            answer = process.stdout.readline().decode()
            assert float(answer) if name == "predict" else next(iter(json.loads(answer).values())) == line
        answer = {"recall": {"query": "a\tb\tc", "results": []}, "inference": {"text": "a\tb\tc", "embedding": None},
                  "predict": "nan"}[name]
        process.stdin.write(b"\na\tb\tc\n")
        process.stdin.flush()
        while b"stdin:5: columns: 3 instead of " not in (report := process.stderr.readline()):
            assert report, "the end"
        process.stdout.readline()  # of the blank line
        found = process.stdout.readline().decode().strip()
        assert (found if name == "predict" else json.loads(found)) == answer
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not out
    assert b"stdin: 2 of 5 lines are blank or malformed: stdin:4 (blank), " in err


@pytest.mark.parametrize("name", ["recall", "inference", "predict"])
def test_empty_stdin(commands, name):
    out, err, code = pipe(b"", *commands[name])
    assert (out, code) == ("", 2) and err.splitlines()[-1].endswith(" stdin: the file is empty")
    out, err, code = pipe(b"\xef\xbb\xbf\n", *commands[name])
    assert (out, code) == ({"recall": "\t\t\n", "inference": "\t\n", "predict": "nan\n"}[name], 2)
    assert err.splitlines()[-1].endswith(" stdin: the file is empty")


def test_stdin_that_is_not_utf8_or_malformed(commands):
    """What came before is answered."""
    query, pair = lines_for("recall")[0].encode(), lines_for("predict")[0].encode()
    out, err, code = pipe(b"\xef\xbb\xbf" + query + b"\n\n" + GBK + b"\n" + query, *commands["recall"])
    assert code == 2 and "--query stdin:3: not UTF-8 at byte 1 of the line; charset-normalizer: it may be GBK" in (
        err.splitlines()[-1])
    assert [line.split("\t")[0] for line in out.splitlines()] == [query.decode()] * 3 + [""]
    out, err, code = pipe(pair + b"\ra\r\n" + pair, *commands["predict"], "--strict_data")
    assert code == 2 and "--text_pair_file stdin:2: columns: 1 instead of 2" in err.splitlines()[-1]
    assert len(out.splitlines()) == 1


def test_a_reader_that_has_seen_enough_ends_it_quietly(commands):
    with start(*commands["inference"], "--format", "jsonl", "--quiet") as process:
        process.stdin.write("语义检索\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == "语义检索"
        process.stdout.close()  # as head -1 does
        process.stdin.write("语义检索\n".encode() * 5)
        process.stdin.flush()  # and stays open
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize("number, message, code", [
    (signal.SIGINT, b"inference.py: interrupted\n", 130), (signal.SIGTERM, b"", 143)])
def test_a_signal_while_it_waits_for_a_line(commands, number, message, code):
    with start(*commands["inference"], "--quiet") as process:
        process.stdin.write("语义检索\n".encode())
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(number)
        assert process.stderr.read() == message
        assert process.wait(60) == code


def test_embeddings_of_stdin_to_a_file(commands, tmp_path):
    lines = lines_for("inference")
    assert piped(lines, *commands["inference"], "--output_file", tmp_path / "v.npy") == []
    _, numbers = split(piped(lines, *commands["inference"]), "tsv")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), numbers, atol=1e-6)


@pytest.mark.parametrize("script, flags, message", [
    ("inference.py", ["-", "--text", "x"], "--text and --input_file - are mutually exclusive"),
    ("inference.py", ["-", "--input_file", "-"], "argument --input_file: not allowed with argument FILE"),
    ("inference.py", ["nowhere"], "argument FILE: nowhere: no such file"),
    ("inference.py", ["-", "--output_file", "v.npy", "--format", "tsv"], "--format is for printed embeddings"),
    ("inference.py", ["--format", "csv"], "argument --format: invalid choice: 'csv'"),
    ("predict.py", [], "one of the arguments --text_pair_file FILE is required"),
    ("predict.py", ["-", "--scale", 5], "--margin and --scale: the loss is computed of a file"),
    ("recall.py", ["--query", "--query", "x", "--corpus_file", "-"], "argument --corpus_file: -: no such file"),
    ("recall.py", ["--query", "--query", "x"], "--query TEXT and queries from stdin are mutually exclusive")])
def test_refused(tmp_path, script, flags, message):
    (tmp_path / "model_state.pdparams").write_bytes(b"")
    assert message in refuse(script, "--params_path", ".", *flags, cwd=tmp_path)


def test_queries_of_stdin_are_for_one_process(tmp_path):
    (tmp_path / "model_state.pdparams").write_bytes(b"")
    line = refuse("recall.py", "--params_path", ".", "--query", cwd=tmp_path,
                  env={"PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ID": "0"})
    assert "queries from stdin need a single process" in line
