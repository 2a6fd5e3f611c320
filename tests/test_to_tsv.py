"""Files of other kinds as the scripts read them: scripts/to_tsv.py."""

import bz2
import io
import itertools
import json
import subprocess
import sys

from simcse.console import InputError

import pytest
import to_tsv
from conftest import ROOT, SHARED

CASES = SHARED / "cases"


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """`convert(content, *flags)` of a file's content, as main does it; the lines written, and stderr."""
    def run(content, *flags, name="in.csv"):
        path = content
        if isinstance(content, (str, bytes)):
            path = tmp_path / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        target = tmp_path / "out" / "out.tsv"
        monkeypatch.setattr(sys, "argv", ["to_tsv.py", "--input_file", str(path), "--output_file", str(target), *flags])
        try:
            to_tsv.main()
        finally:
            said.append(capsys.readouterr().err)
        return target.read_text(encoding="utf-8").splitlines()

    said = []
    run.said = said
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    return run


def jsonl(*objects):
    return "".join(json.dumps(each) + "\n" for each in objects)


# ---------------------------------------------------------------------------------------------------- csv and tsv
def test_csv_with_a_header_quotes_and_line_breaks(convert):
    content = 'id,title,content\r\n0,"甲,""乙""","一\r\n二\n\n三"\r\n1,丙,"  四\t五 \u3000六"\r\n'
    assert convert(content) == ['0\t甲,"乙"\t一 二 三', "1\t丙\t四 五 六"]
    assert ": read as csv\n" in convert.said[0]
    assert "a header, --header no if that is wrong: id, title, content\n" in convert.said[0]
    assert "wrote 2 lines of id, title, content to " in convert.said[0]
    assert convert(content, "--fields", "content", "id") == ["一 二 三\t0", "四 五 六\t1"]
    assert convert(content, "--fields", "3") == ["一 二 三", "四 五 六"]
    assert convert(content, "--header", "no", "--fields", "2")[0] == "title"
    with pytest.raises(InputError, match="--fields titel: no such column in .*; there are id, title, content$"):
        convert(content, "--fields", "titel")
    with pytest.raises(InputError, match="--fields 4: no such column in .*; there are 1, 2, 3$"):
        convert(content, "--fields", "4", "--header", "no")


@pytest.mark.parametrize("content, header", [
    ("sent0,sent1\n甲,乙\n", True), ("甲,乙\n丙,丁\n", False), ("问题,答案\n甲,乙\n", False),
    ("apple,pear\nbanana,fig\n", False), ("a b,c\n甲,乙\n", False), ("text,text\n甲,乙\n", False),
    ("1,2\n3,4\n", False)])
def test_a_header_has_ascii_names(convert, content, header):
    assert (convert(content)[0] == "\t".join(content.split("\n")[0].split(","))) is not header
    assert ("the first row is a header" in convert.said[0]) is header


def test_a_header_that_is_given(convert):
    content = "问题,答案\n甲,乙\n"
    assert convert(content, "--header", "yes") == convert(content, "--fields", "问题", "答案") == ["甲\t乙"]


@pytest.mark.parametrize("content, kind, rows", [
    ("甲,乙\n丙,丁\n", "csv", [["甲", "乙"], ["丙", "丁"]]),
    ("甲\t乙,丙\n丁\t戊,己\n", "tsv", [["甲", "乙,丙"], ["丁", "戊,己"]]),
    ("甲,乙\n丙\n丁,戊,己\n", "tsv", [["甲,乙"], ["丙"], ["丁,戊,己"]]),
    ('"甲,乙",1\n"丙\n丁",2\n', "csv", [["甲,乙", "1"], ["丙 丁", "2"]]),
    ('"甲"\t"乙 ""丙"""\n"丁"\t""\n', "quoted_tsv", [["甲", '乙 "丙"']]),
    ('甲\t"乙 ""丙"""\n丁\t戊\n', "quoted_tsv", [["甲", '乙 "丙"'], ["丁", "戊"]]),
    ('"甲"是\t乙"\n丙\t"丁"\n', "tsv", [['"甲"是', '乙"'], ["丙", '"丁"']]),
    ("第一段\r第二段\r\n", "tsv", [["第一段"], ["第二段"]]),
    ("甲\x85乙\u2028丙\n丁\n", "tsv", [["甲 乙 丙"], ["丁"]])])
def test_formats_are_told_apart(convert, content, kind, rows):
    """Quotes in tsv are the texts' own unless the first lines are those of CSV with tabs."""
    assert convert(content) == ["\t".join(row) for row in rows]
    assert f": read as {kind}\n" in convert.said[0]


def test_a_format_that_is_forced(convert):
    assert convert("甲,乙\n丙,丁\n", "--format", "tsv") == ["甲,乙", "丙,丁"]
    assert convert("甲\t乙,丙\n", "--format", "csv") == ["甲 乙\t丙"]


@pytest.mark.parametrize("line, complaint", [
    ('"甲"乙,丙\n', "',' expected after '\"'"), ('"甲,乙\n', "unexpected end of data")])
def test_a_row_with_other_quotes_is_named(convert, line, complaint):
    content = "".join(f"问{row},答{row}\n" for row in range(200))
    with pytest.raises(InputError, match=f"in.csv:201: the quotes of this row are not those of CSV: {complaint}; fix"):
        convert(content + line + content, "--format", "csv")
    assert convert(content + line + content, "--format", "tsv")[200] == line.strip()


def test_rows_that_are_skipped_are_counted_and_the_first_three_named(convert):
    content = "a,b\n甲,乙\n,丙\n\n丁\n戊, \n己,庚,辛\n" + "壬,癸\n" * 9
    assert convert(content, "--format", "csv") == ["甲\t乙"] + ["壬\t癸"] * 9
    assert "4 of 14 lines are malformed: " in convert.said[0]
    places = ["in.csv:3 (an empty field)", "in.csv:5 (columns: 1 instead of 2)", "in.csv:6 (an empty field); skipped;"]
    assert all(place in convert.said[0] for place in places) and "in.csv:7" not in convert.said[0]
    with pytest.raises(InputError, match=r"in.csv:3: an empty field \(--strict_data\)"):
        convert(content, "--format", "csv", "--strict_data")
    with pytest.raises(InputError, match="3 of 4 lines are malformed"):
        convert("甲,乙\n丙,\n丁,\n戊,\n")
    for nothing in ("", "\n\n", " \r\n"):
        with pytest.raises(InputError, match="--input_file .*in.csv: the file is empty"):
            convert(nothing, "--fields", "1", "--labels", "positives")
    with pytest.raises(InputError, match="the file is empty$"):
        convert("sent0,sent1\n", "--header", "yes")


@pytest.mark.parametrize("content, complaint", [
    ("标题,文本\n这家餐厅的牛肉面,非常好吃\n今天的天气,我们去公园散步\n".encode("gbk"),
     ":1: not UTF-8 at byte 1 of the line; it looks like GBK .* iconv -f GB18030"),
    ("甲\n".encode("utf-16"), ":1: not UTF-8 text, but UTF-16; convert it: iconv"),
    (b"PK\x03\x04...xl/", "an Excel workbook"), (bz2.compress(b"a"), "compressed by bzip2; bunzip2 it$")])
def test_what_is_no_utf8_is_refused(convert, content, complaint):
    with pytest.raises(InputError, match=complaint):
        convert(content)


@pytest.mark.parametrize("flags, complaint", [
    (["--format", "jsonl", "--header", "no"], "--header is for csv and tsv"), (["--fields", ""], "an empty text"),
    (["--feilds", "a"], "did you mean --fields?")])
def test_flags_that_are_refused(convert, flags, complaint):
    with pytest.raises(SystemExit) as ended:
        convert("甲\n", *flags)
    assert ended.value.code == 2 and complaint in convert.said[0] and convert.said[0].count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ jsonl
def test_a_list_gives_a_line_for_each_member(convert):
    content = jsonl({"query": "问", "pos": ["甲", "乙"], "neg": ["丙", "丁\n戊"]},
                    {"query": "问2", "pos": ["己"], "neg": ["庚"]})
    rows = [f"问\t{pos}\t{neg}" for pos, neg in itertools.product("甲乙", ["丙", "丁 戊"])] + ["问2\t己\t庚"]
    assert convert(content) == rows
    assert convert(content, "--fields", "pos", "query") == ["甲\t问", "乙\t问", "己\t问2"]


def test_what_is_always_empty_is_left_out(convert):
    content = jsonl({"_id": "d0", "title": "", "text": "甲", "tags": [], "more": None},
                    {"_id": "d1", "title": "", "text": "\u4e59", "tags": []})
    assert convert(content) == ["d0\t甲", "d1\t乙"] and convert(content, "--fields", "text") == ["甲", "乙"]
    assert "wrote 2 lines of _id, text to " in convert.said[0]


def test_objects_that_are_skipped(convert):
    good = '{"a": "甲", "b": ["乙", true]}\n' * 9
    bad = ['{"a": "甲"', "[1]", '{"a": "甲"}', '{"a": [], "b": "乙"}', '{"a": "甲", "b": {"c": 1}}',
           '{"a": "\\ud800", "b": "乙"}', '{"a": null, "b": "乙"}', '{"a": " ", "b": "乙"}']
    problems = ["Expecting ',' delimiter", "JSON, but no object", "no b", "no a", "b is no text",
                "half of a surrogate pair", "no a", "an empty field"]
    for line, problem in zip(bad, problems):
        assert convert(good + line + "\n", "--fields", "a", "b") == ["甲\t乙", "甲\t1"] * 9
        assert f"in.csv:10 ({problem}" in convert.said[-1]


# ----------------------------------------------------------------------------------------------------------- labels
LABELLED = "问\t甲\t1\n问\t乙\t0\n问\t丙\t1\n问2\t丁\t1\n问3\t戊\t0\n问\t己\t0\n问\t乙\t1\n"


def test_positives(convert):
    assert convert(LABELLED, "--labels", "positives") == ["问\t甲", "问\t丙", "问2\t丁", "问\t乙"]
    flags = ["--labels", "positives", "--fields", "b", "a", "label"]
    content = jsonl({"a": "甲", "b": "乙", "label": 1}, {"a": "丙", "b": "丁", "label": False})
    assert convert(content, *flags) == ["乙\t甲"]


def test_negatives_of_the_same_text(convert):
    assert convert(LABELLED, "--labels", "negatives") == ["问\t甲\t己", "问\t乙\t己", "问\t丙\t己"]
    assert "left out 1 pair of label 1 whose first text has none of label 0\n" in convert.said[0]
    assert "wrote 3 lines to " in convert.said[0]


def test_labels_that_are_none(convert):
    assert convert(LABELLED + "问\t庚\t-\n问\t辛\t0.5\n", "--labels", "positives")[-1] == "问\t乙"
    assert "2 of 9 lines are malformed: " in convert.said[0] and "(label '-' is neither 0 nor 1)" in convert.said[0]
    with pytest.raises(InputError, match="--labels positives leaves no pair"):
        convert("问\t甲\t0\n", "--labels", "positives")
    with pytest.raises(InputError, match="--labels needs text, text and label, not 1, 2; choose three columns with"):
        convert("问\t甲\n", "--labels", "positives")


# ------------------------------------------------------------------------------------------------ files of others
@pytest.mark.skipif(not CASES.is_dir(), reason=f"the files of users are not here ({CASES})")
@pytest.mark.parametrize("name, flags, like, columns", [
    ("01-comma-csv-with-quotes/sup.csv", [], "03-jsonl/dev.csv", 3),
    ("03-jsonl/train.jsonl", [], "03-jsonl/dev.csv", 3),
    ("01-comma-csv-with-quotes/pairs.csv", [], "03-jsonl/dev.csv", 2),
    ("01-comma-csv-with-quotes/dev_tab.csv", [], "03-jsonl/dev.csv", 2),
    ("03-jsonl/corpus.jsonl", ["--fields", "text"], "03-jsonl/corpus.txt", 1),
    ("02-labelled-pairs/labelled.tsv", ["--labels", "positives"], "02-labelled-pairs/positives.tsv", 2)])
def test_files_of_users(convert, name, flags, like, columns):
    """The rows are those of the file without quotes, apart from runs of blanks."""
    rows = [line.split("\t") for line in convert(CASES / name, *flags)]
    expected = [[" ".join(field.split()) for field in line.split("\t")]
                for line in (CASES / like).read_text(encoding="utf-8").splitlines()]
    assert [row[:len(expected[0])] for row in rows] == expected and {len(row) for row in rows} == {columns}


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the files of users are not here ({CASES})")
def test_line_breaks_in_the_cells_of_a_users_file(convert):
    lines = convert(CASES / "01-comma-csv-with-quotes" / "corpus.csv")
    assert len(lines) == 200 and sum(line.endswith(" 补充：急") for line in lines) == 40


def test_from_stdin_to_stdout_without_paddle(tmp_path):
    """As a process of its own, in a terminal whose encoding is another."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['paddle'] = sys.modules['paddlenlp'] = None\n")
    ran = subprocess.run([sys.executable, ROOT / "scripts" / "to_tsv.py", "--input_file", "-"],
                         input="title,text\n甲,乙\n".encode(), capture_output=True,
                         env={"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "latin-1:replace"})
    assert (ran.returncode, ran.stdout) == (0, "甲\t乙\n".encode()), ran.stderr
    assert b"wrote 1 line of title, text to stdout\n" in ran.stderr
