"""Text files; nothing here needs paddle."""

import subprocess
import sys

from simcse import console, files
from simcse.text import lines as line_reading
from simcse.text import textfile

import numpy as np
import pytest
from conftest import ROOT, read_texts


def rows(tmp_path, content, columns=2, **options):
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    return [row.fields for row in textfile.read_rows(str(path), columns, "--flag", **options)]


@pytest.mark.parametrize("content", [
    "a\tb\nc d\te", "a\tb\r\nc d\te\r\n", "\ufeffa\tb\nc d\te\n", "a\tb\rc d\te\r", "\n \na\tb\n\t\n\nc d\te\n",
    " a\tb \n\u3000c d\te\n"])
def test_line_ends_bom_blank_lines_and_outer_spaces(tmp_path, content):
    assert rows(tmp_path, content.encode()) == [["a", "b"], ["c d", "e"]]


def test_inner_spaces_stay(tmp_path):
    assert rows(tmp_path, "a  b\u3000c\t d   e \n".encode()) == [["a  b\u3000c", "d   e"]]


def test_unusual_line_breaks_are_text(tmp_path):
    assert rows(tmp_path, "a\u2028b\x0bc\x85d\te\n".encode()) == [["a\u2028b\x0bc\x85d", "e"]]


def test_bad_lines_are_skipped_and_reported(tmp_path, capsys):
    content = "".join(f"q{i}\tt{i}\n" for i in range(6)) + "one\nx\ty\tz\n\tempty\nlast\n"
    assert rows(tmp_path, content.encode())[-1] == ["q5", "t5"]
    report = capsys.readouterr().err
    assert "4 of 10 lines are malformed" in report
    assert "file.csv:7 (columns: 1 instead of 2)" in report and "file.csv:8 (columns: 3" in report
    assert "file.csv:9 (an empty field)" in report and "file.csv:10" not in report


@pytest.mark.parametrize("content, message", [
    (b"", "the file is empty"), (b"\n\n", "the file is empty"), (b"a\nb\nc\td\n", "2 of 3 lines are malformed"),
    (b"a\n", "1 of 1 line is malformed")])
def test_no_good_line_or_mostly_bad_is_an_error(tmp_path, content, message):
    with pytest.raises(console.InputError, match=message):
        rows(tmp_path, content)


def test_half_bad_is_no_error(tmp_path):
    assert rows(tmp_path, b"a\tb\nc\n") == [["a", "b"]]


def test_strict_stops_at_the_first_bad_line(tmp_path, monkeypatch):
    monkeypatch.setattr(console.settings, "strict_data", True)
    with pytest.raises(console.InputError, match=r"--flag .*file\.csv:2: .*--strict_data"):
        rows(tmp_path, b"a\tb\nc\nd\te\n")


@pytest.mark.parametrize("content, cause", [
    ("a\tb\n中文\t文本\n".encode("gbk"), "GBK"), ("a\tb\n".encode("utf-16"), "UTF-16"),
    (b"a\tb\n\x81\xff\xff\x81\x0f\n", "damaged")])
def test_not_utf8_names_file_line_and_cause(tmp_path, content, cause):
    with pytest.raises(console.InputError, match=rf"--flag .*file\.csv:\d: not UTF-8.*{cause}"):
        rows(tmp_path, content)


def test_every_line_has_a_row_where_rows_stand_beside_lines(tmp_path, capsys, monkeypatch):
    content = b"a\tb\n\n\t\nc\nd\te\tf\ng\t\nh\ti\nj\tk\nl\tm\n"
    assert rows(tmp_path, content, keep_malformed=True) == [
        ["a", "b"], [""], ["", ""], ["c"], ["d", "e", "f"], ["g", ""], ["h", "i"], ["j", "k"], ["l", "m"]]
    report = capsys.readouterr().err
    assert "5 of 9 lines are blank or malformed: " in report
    assert "file.csv:2 (blank), " in report
    assert "file.csv:4 (columns: 1 instead of 2); no result (NaN, empty or null); fix or remove" in report
    mostly_blank = rows(tmp_path, b"a\tb\n\n\n\n", keep_malformed=True)
    assert mostly_blank == [["a", "b"], [""], [""], [""]], "blank is not malformed"
    for content, message in ((b"a\tb\nc\nd\n", "2 of 3 lines are blank or malformed"), (b"\n \n", "the file is empty")):
        with pytest.raises(console.InputError, match=message):
            rows(tmp_path, content, keep_malformed=True)
    monkeypatch.setattr(console.settings, "strict_data", True)
    with pytest.raises(console.InputError, match=r"file\.csv:2: blank \(--strict_data\)"):
        rows(tmp_path, b"a\tb\n\nc\td\n", keep_malformed=True)


def test_labels_must_be_numbers(tmp_path, capsys):
    path = tmp_path / "file.csv"
    path.write_text("a\tb\t1\nc\td\t0.5\ne\tf\tyes\n")
    labelled = textfile.read_rows(str(path), 3, "--flag", textfile.find_label_problem)
    assert list(labelled) == [textfile.Row(1, ["a", "b", "1"]), textfile.Row(2, ["c", "d", "0.5"])]
    assert "label 'yes' is not a number" in capsys.readouterr().err


LINES = ["好", "“引号”", "《书》", " 前空", "\u3000", "", "  ", "abc", "x" * 99, "\u3000头", "é", "\x1c", "😀", "a\tb"]


@pytest.mark.parametrize("chunk", [7, 16, 1 << 22])
def test_a_text_file_by_offsets_is_the_list_of_its_texts(tmp_path, monkeypatch, capsys, chunk):
    """Random files of difficult lines, with every kind of line end, against read_texts: the same texts or the same
    error, and the same report."""
    monkeypatch.setattr(line_reading, "SCAN_BYTES", chunk)
    random, path, seen = np.random.default_rng(chunk), str(tmp_path / "file.txt"), set()
    for _ in range(150):
        lines = LINES[: int(random.choice([len(LINES), len(LINES) - 1]))]
        text = "".join(lines[random.integers(len(lines))] + random.choice(["\n", "\r\n", "\r", "\n\n"])
                       for _ in range(random.integers(1, 40))) + str(random.choice(["", "末", "\r", " "]))
        damage = b"\xb0" if random.random() < 0.1 else b""
        (tmp_path / "file.txt").write_bytes(random.choice([b"", b"\xef\xbb\xbf"]) + text.encode() + damage)
        results = []
        for read in (lambda: read_texts(path, "--flag"), lambda: list(textfile.TextFile(path, "--flag"))):
            try:
                texts = read()
            except console.InputError as error:
                texts = str(error)
            results.append((texts, capsys.readouterr().err))
        assert results[0] == results[1], text
        seen.add((type(results[0][0]), bool(results[0][1])))
    assert seen >= {(list, True), (list, False), (str, False)}


def test_a_text_file_is_a_sequence(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("".join(f"第{n}行\n" for n in range(50)), encoding="utf-8")
    texts = textfile.TextFile(str(path), "--flag")
    assert len(texts) == 50 and texts[-1] == "第49行" and texts[np.int32(7)] == "第7行"
    assert texts[10:13] == ["第10行", "第11行", "第12行"] and texts[48:99] == ["第48行", "第49行"]
    with pytest.raises(IndexError):
        texts[50]
    with pytest.raises(console.InputError, match=r"--flag .*file.txt:2: columns: 2 instead of 1"):
        path.write_text("a\nb\tc\n")
        monkeypatch.setattr(console.settings, "strict_data", True)
        textfile.TextFile(str(path), "--flag")


def test_a_pipe_is_a_text_file_too():
    code = ("from simcse.text.textfile import TextFile; texts = TextFile('/dev/stdin', '--flag'); "
            "print(texts[1], len(texts))")
    result = subprocess.run([sys.executable, "-c", code], input="一\n二\n".encode(), capture_output=True, cwd=ROOT)
    assert result.stdout.decode() == "二 2\n", result.stderr


def test_new_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with files.new_file(str(path)) as file:
        file.write("whole")
    with pytest.raises(RuntimeError), files.new_file(str(path)) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "whole" and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, 1):  # what a killed process left goes, what another one writes stays
        (path.parent / f".file.txt.{pid}.tmp").write_text("half")
    with files.new_file(str(path)) as file:
        file.write("again")
    assert sorted(p.name for p in path.parent.iterdir()) == [".file.txt.1.tmp", "file.txt"]
