"""Files that are not what the scripts read: named, with the command that converts them; and texts that only look so."""

import gzip
import io
import json
import re
import shlex
import subprocess
import sys
import zipfile

from simcse import console, flags
from simcse.console import InputError
from simcse.text import formats, textfile

import pytest
import to_tsv
from conftest import ROOT, SHARED, read_texts

CASES = SHARED / "cases"
TRAINING = (1, 2, 3)
SENTENCES = ["初婚未育证明怎么开", "这种图片是用什么软件制作的", "校花的贴身高手什么时候写完", "人与畜生的区别是什么"]


def refused(content, columns, flag="--flag", path="in.csv"):
    """What is said of a file's content; None: it is read."""
    try:
        formats.refuse_other_formats(content.splitlines(), path, flag, columns)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(f"{flag} ")
        return str(error)
    return None


def table(delimiter, *columns, rows=12):
    return "".join(delimiter.join(column.format(row) for column in columns) + "\n" for row in range(rows))


JSONL = "".join(json.dumps({"_id": f"d{row}", "title": "", "text": f"文本{row}"}) + "\n" for row in range(3))
TRIPLES = "".join(json.dumps({"query": f"问{row}", "pos": [f"答{row}"], "neg": ["甲", "乙"]}) + "\n"
                  for row in range(3))
HIT = {"rank": 1, "line": 3, "document": "甲", "cosine": 0.5}
RESULTS = "".join(json.dumps({"query": f"问{row}", "results": [HIT]}) + "\n" for row in range(3))
OTHERS = [  # content, columns, what it is, flags of the command
    ('sent0,sent1,hard_neg\r\n甲,"乙,丙",丁\r\n戊,己,庚\r\n', TRAINING, "CSV with quotes around fields", ""),
    ("sent0,sent1,hard_neg\n甲,乙,丁\n戊,己,庚\n", TRAINING, "CSV with a header, sent0, sent1, hard_neg", ""),
    ("sent0,sent1,hard_neg\n甲,乙,丁\n戊,己,庚\n", (2,), "CSV with a header", "--fields sent0 sent1 "),
    ('"id","content"\r\n"0","一\r\n\r\n二"\r\n"1","三"\r\n', (1,), "CSV with quotes around fields", ""),
    (",text,url\n0,甲甲甲,a\n1,乙乙乙,b\n", (1,), "CSV with a header, , text, url", "--fields text "),
    ("甲,乙\n丙,丁\n", (2,), "CSV, with commas between columns", ""),
    ("甲,乙,1\n丙,丁,0\n戊,己,1\n" * 2, TRAINING, "CSV with numbers in its third column (1, 0): labels or scores",
     "--labels positives "),
    ("0,甲\n1,乙\n2,丙\n", (1,), "CSV with rows numbered by its first column", "--fields 2 "),
    ('text\n"甲,乙"\n"丙,丁"\n"戊,己"\n', (1,), "CSV with quotes around fields", "--format csv "),
    ('"甲"\t"乙"\n"丙"\t"丁"\n', (2,), "TSV with quotes around fields", ""),
    ('甲\t"乙 ""丙"""\n丁\t戊\n', (2,), "TSV with quotes around fields", ""),
    ("甲\t乙\t1\n丙\t丁\t0\n", TRAINING, "TSV with numbers in its third column (1, 0)", "--labels positives "),
    ("甲\t乙\t1\n丙\t丁\t0\n", (2,), "TSV with numbers in its third column", "--labels positives "),
    ("甲\t乙\t0.83\n丙\t丁\t0.5\n", TRAINING, "TSV with numbers in its third column", "--fields 1 2 "),
    ("sentence1\tsentence2\tlabel\n甲\t乙\t1\n丙\t丁\t0\n", TRAINING, "TSV with a header", "--labels positives "),
    ("问题\t答案\n甲\t乙\n", (2,), "TSV with a header, 问题, 答案", ""),
    ("标准问\t相似问1\n甲\t乙\n", TRAINING, "TSV with a header, 标准问, 相似问1", ""),
    (table(",", "文{}", "本{}", "0.5", rows=30), TRAINING, "CSV with numbers in its third column", "--fields 1 2 "),
    ("0\t甲\t乙\n1\t丙\t丁\n2\t戊\t己\n", TRAINING, "TSV with rows numbered", "--fields 2 3 "),
    (table("\t", "10{}7", "文本{}", rows=30), TRAINING, "TSV with rows numbered", "--fields 2 "),
    (table("\t", "文本{}", "1"), TRAINING, "TSV with a few numbers in its last column (1): labels", "--fields 1 "),
    ('text\n"今天, 明天"\n好的\n"你好, 世界"\n', (1,), "its first line is a header, text", "--format csv "),
    ("content\n" + table("", "第{},句"), (1,), "its first line is a header, content", "--format tsv "),
    ('一句\n"今天, 明天"\n"他说, ""好"""\n"甲,乙"\n', (1,), "CSV with quotes around fields", "--format csv "),
    ("content\n" + table("", "标题\n文本{}"), (1,), "its first line is a header, content", ""),
    (JSONL, (1,), "JSON objects, one a line", ""), (TRIPLES, TRAINING, "JSON objects", ""),
    (TRIPLES, (2,), "JSON objects", "--fields query pos "),
    (RESULTS, (3,), "JSON objects, one a line, as recall.py --format jsonl writes them", "")]


@pytest.mark.parametrize("content, columns, what, flags", OTHERS, ids=map(str, range(len(OTHERS))))
def test_another_format_is_named_and_its_command_makes_what_is_read(tmp_path, monkeypatch, content, columns, what,
                                                                    flags):
    path = tmp_path / "in.csv"
    path.write_bytes(content.encode())
    said = refused(content, columns, path=str(path))
    assert said.startswith(f"--flag {path}: {what}") and f"; needed: {formats.COLUMNS[columns]}; " in said
    assert said.endswith("in.tsv converts it; --plain_text takes its lines as they are")
    command = re.search("(python scripts/to_tsv.py .*) converts it", said)[1]
    assert f"in.csv {flags}--output_file" in command
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    to_tsv.main()
    made = (tmp_path / "in.tsv").read_text(encoding="utf-8")
    assert refused(made, columns) is None and made.split("\n")[0].count("\t") + 1 in columns


TEXTS = [
    '他说:"你好, 世界"\n"引号"在前面\n在后面是"引号"\n', '"全在引号里"\n"也在,引号里"\n',
    '"Yes, indeed," she said.\n"No," he said.\n',
    '"Yes, of course", she said\n"No, never", he said\n', "[0, 1]\n[1, 2]\n[2, 3]\n",
    "中国队,韩国队,1\n中国队,日本队,0\n",
    '"Yes", she said\n', '"你好,世界",他说\n', '5" 屏幕\n6" 屏幕, 7" 屏幕\n', '""\n"""docstring"""\n',
    "白日依山尽,黄河入海流\n欲穷千里目,更上一层楼\n", "苹果,香蕉,3\n",
    table(",", "苹果{}", "红", "3"), table(",", "手机{}", "64{}"), "1,打开设置\n2,点击关于\n3,重启\n",
    "一,二,三\n一,二\n", "1,000\n2,000\n1,500\n",
    "{花括号}\n{a} 和 {b}\n{}\n", '{"a": 1} 是什么\n{"a": 1\n{"b"}\n', "[1]\n[2]\n", "[CLS]\n[SEP]\n",
    '["甲", "乙"] 怎么排序\n', "{\n}\n", "1\n2\n3\n", "2021年\n第1章\n3.14\n", "title\n", "Python\nJava\n",
    "标题\n摘要\n文本\n", "Text\n第一段\n第二段\n", "什么是id,title\n", "a\tb\n", "a\n", "# 注释\n<b>粗</b>\n", "",
    'def f():\n    """Doc,\n    \n    of f.\n    """\n    return 1, 2\n' * 4, "text\nsim\n##chi\n钼\n",
    "BZh\n", "PAR1 基因\n", "<!DOCTYPE html> 是什么\n", "PK\n", "问题\n", "甲;乙\n丙;丁\n"]
PAIRS = ["甲\t乙,丙\n丁\t戊,己,庚\n", '"甲"是\t乙"\n丙\t"丁"\n', '"甲"\t"乙"\n', "1+1\t2\n2+3\t5\n5+4\t9\n", "问\t1\n",
         "Python\tJava\nC\tC++\n", "标题一\t文本一\n", "text\ttext\n甲\t乙\n", '{"a": 1}\t甲\n{"b": 2}\t乙\n',
         "title\tabc\n甲\t乙\n"]


@pytest.mark.parametrize("content, columns", [
    *((content, columns) for content in TEXTS for columns in ((1,), TRAINING)),
    *((content, columns) for content in PAIRS for columns in ((2,), TRAINING)),
    ("1+1\t2\t3\n2+3\t5\t6\n", TRAINING), ("甲\t乙\t丙1\n丁\t戊\t2\n", TRAINING),
    ("甲\t乙\t1\n丙\t丁\t0\n", (2, 3)), ("甲\t乙\t0.5\n丙\t丁\t0.25\n", (3,))])
def test_ordinary_texts_are_not_refused(content, columns):
    assert refused(content, columns) is None


def test_texts_of_every_kind_in_one_file_are_read(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("".join(TEXTS).replace("\t", " "), encoding="utf-8")
    assert read_texts(path) == list(textfile.TextFile(str(path), "--flag"))


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real texts are not here")
def test_real_texts_are_read():
    for path in (SHARED / "data").glob("*/recall/*.csv"):
        columns = textfile.count_columns(str(path), "--flag", (2, 3) if path.stem == "dev_labeled" else TRAINING)
        assert sum(1 for _ in textfile.read_rows(str(path), columns, "--flag")) > 100


def test_commas_that_may_be_columns_are_said(capsys):
    couplets = "".join(f"第{row}句白日依山尽,黄河入海流\n" for row in range(30))
    assert refused(couplets, (1,)) is None
    assert "in.csv: each of the first 30 lines has 1 comma; if that makes columns of it: python scripts/to_tsv.py" in (
        capsys.readouterr().err)
    quotes = "".join(f'"第{row}句"\n' for row in range(30))
    assert refused(quotes, (1,)) is None
    assert "each of the first 30 lines is in quotes; if they are none of the text: python" in capsys.readouterr().err
    assert refused(couplets.replace(",", ", "), (1,)) is None and not capsys.readouterr().err


def test_what_may_be_columns_is_said_once(tmp_path, capsys):
    lines = [(row, f"第{row}句白日依山尽,黄河入海流") for row in range(130)]
    assert list(formats.checked(iter(lines), "stdin", "--flag", (1,))) == lines
    said, = capsys.readouterr().err.splitlines()
    assert "stdin: each of the first 20 lines has 1 comma" in said
    (tmp_path / "train.csv").write_text("".join(f"{line}\n" for _, line in lines), encoding="utf-8")
    textfile.TextFile(str(tmp_path / "train.csv"), "--flag", TRAINING)
    said, = capsys.readouterr().err.splitlines()
    assert "each of the first 100 lines has 1 comma" in said


@pytest.mark.parametrize("content, advice", [
    ('[\n {"text": "甲"},\n {"text": "乙"}\n]\n', "a JSON document; jq -c"),
    ('[{"text": "甲"}]\n', "a JSON array; jq -c"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    ("<!DOCTYPE html>\n<html>\n", "a page of HTML"),
    ('[{"text": "甲"},\n{"text": "乙"}]\n', "a JSON array; jq -c"),
    ('[{"text": "甲"}, {"text": "乙"}]\n', "a JSON array; jq -c"), ('["甲", "乙"]\n', "a JSON array; jq -c"),
    ('"\\u7532"\n"乙"\n', "JSON strings, one a line; jq -r"), ("{'text': '甲'}\n{'text': '乙'}\n", "dicts as Python"),
    ("__label__体育 甲\n__label__财经 乙\n", "fastText's labels before texts; sed -E "),
    ('<?xml version="1.0"?>\n<doc>\n', "an XML document"),
    ('["甲", "乙"]\n["丙", "丁"]\n', "lines that are JSON arrays; jq -r '@tsv' in.csv")])
def test_documents_are_named(content, advice):
    assert f"in.csv: {advice}" in refused(content, (2,))


def test_too_few_columns_are_said():
    assert "there are too few columns of texts in it: _id, title, text;" in refused(JSONL, (2,))


@pytest.mark.parametrize("flag, advice", [
    ("--text_pair_file", "inference.py --input_file takes texts"), ("--test_set_file", "--train_set_file takes texts"),
    ("--similar_text_pair", "recall.py takes documents, one a line, by --corpus_file")])
def test_one_column_where_two_are_needed_names_the_flag_that_takes_it(flag, advice):
    said = refused("甲\n乙\n", (2,), flag)
    assert f"in.csv: one column; needed: two texts a line, a tab between them; {advice}" in said
    assert refused("甲\t乙\n丙\n", (2,), flag) is None


def test_both_readers_refuse_and_a_flag_reads_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl"
    path.write_text(JSONL, encoding="utf-8")
    for read in (read_texts, textfile.TextFile, lambda *to: textfile.count_columns(*to, TRAINING)):
        with pytest.raises(InputError, match=r"--flag .*corpus.jsonl: JSON objects, .*corpus.tsv converts it"):
            read(str(path), "--flag")
    lines = JSONL.splitlines()
    with console.accepting_all_lines():
        assert read_texts(path) == list(textfile.TextFile(str(path), "--flag")) == lines
        assert textfile.count_columns(str(path), "--flag", TRAINING) == 1
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--plain_text"])
    flags.add_data_arguments(parser := flags.ArgumentParser("Reads."))
    parser.parse_args()
    assert console.settings.plain_text
    console.settings.plain_text = False


def test_later_lines_of_stdin_are_taken_and_said(capsys):
    lines = list(enumerate(["id,text", "", '1,"甲, 乙"', '2,"丙, 丁"', '3,"戊"', '4,"己"'], 1))
    assert list(formats.checked(iter(lines), "stdin", "--flag", (1,))) == lines
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith("--flag stdin: CSV with ") and said.endswith("; the lines before it were taken as they are")
    blank_first = iter([(1, ""), (2, '{"text": "甲"}')])
    assert next(blank := formats.checked(blank_first, "stdin", "--flag", (1,))) == (1, "")
    with pytest.raises(InputError, match="--flag stdin: JSON objects"):
        next(blank)


def test_the_first_line_of_stdin_is_looked_at():
    code = "from simcse.text import textfile; print(next(textfile.read_rows('-', 1, '--input_file')).fields)"
    for given, out in (('{"text": "甲"}\n', "stdin: JSON objects, one a line; needed: a text a line; python "
                        "scripts/to_tsv.py --input_file - converts it"), ('"a,b",c\n', "['\"a,b\",c']")):
        ran = subprocess.run([sys.executable, "-c", code], input=given.encode(), capture_output=True, cwd=ROOT)
        assert out in (ran.stdout + ran.stderr).decode()


# --------------------------------------------------------------------------------------------------------- encodings
def wrong(tmp_path, content, name="texts.txt"):
    """What both readers say of a file that is not UTF-8."""
    (tmp_path / name).write_bytes(content)
    said = []
    for read in (read_texts, textfile.TextFile):
        with pytest.raises(InputError) as caught:
            read(str(tmp_path / name), "--flag")
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0]
    return said[0].removeprefix(f"--flag {tmp_path}/{name}:")


SIMPLIFIED = "".join(f"第{row}个问题:{SENTENCES[row % 4]}\n" for row in range(40))
TRADITIONAL = "".join(f"第{row}個問題:臺灣的結婚證明書怎麼申請\n" for row in range(40))
JAPANESE = "日本語の文書検索です\n" * 40
ENGLISH = "What is the difference between man and beast\n" * 3


@pytest.mark.parametrize("text, encoding, kind", [
    (SIMPLIFIED, "gbk", "GBK"), (SIMPLIFIED[:30], "gb18030", "GBK"), (TRADITIONAL, "big5", "Big5"),
    (JAPANESE, "shift_jis", "Shift-JIS"), (JAPANESE, "euc_jp", "EUC-JP"),
    ("한국어 문서 검색 시스템\n" * 9, "euc_kr", "EUC-KR"),
    ("Сегодня хорошая погода в Москве\n" * 9, "cp1251", "Windows-1251"), (SIMPLIFIED, "utf-16", "UTF-16;"),
    (SIMPLIFIED, "utf-16-le", "UTF-16 without a BOM"), (SIMPLIFIED, "utf-16-be", "UTF-16 without a BOM"),
    ("没有换行的一行中文文本,带逗号", "utf-16-be", "UTF-16 without a BOM"),
    (ENGLISH, "utf-16-le", "UTF-16 without a BOM"),
    (SIMPLIFIED, "utf-32", "UTF-32;"), (ENGLISH, "utf-32-be", "UTF-32 without a BOM"), (ENGLISH, "utf-16", "UTF-16;")])
def test_the_command_for_an_encoding_gives_the_text(tmp_path, text, encoding, kind):
    said = wrong(tmp_path, text.encode(encoding))
    assert f"it looks like {kind}" in said
    command = re.search(r"convert it: (iconv -f .*)$", said)[1]
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert (tmp_path / "texts_utf8.txt").read_text("utf-8").removeprefix("\ufeff") == text


@pytest.mark.parametrize("content", ["Les élèves étudient la géographie du café\n".encode("latin-1") * 40,
                                     "混进来\n".encode("gbk"), "甲\n".encode("gbk"), b"abc\x92def\n"])
def test_of_several_encodings_none_is_given_as_the_right_one(tmp_path, content):
    said = wrong(tmp_path, content)
    assert "charset-normalizer: it may be " in said and "look whether it reads well before you convert it" in said
    assert " > " not in said


def test_a_pipe_is_named_and_what_is_cut_off_in_it():
    code = "from simcse.text import textfile; textfile.TextFile('/dev/stdin', '--flag')"
    for given, said in (("甲\n乙\t丙\n丁\n", "--flag /dev/stdin: skipped; 1 of 3 lines are malformed: /dev/stdin:2 "),
                        (JSONL, "to_tsv.py --input_file - converts it"),
                        ("你好世\udce7\udc95", ":1: not UTF-8 at byte 10 of the line; the file ends within a char")):
        ran = subprocess.run([sys.executable, "-c", code], input=given.encode("utf-8", "surrogateescape"),
                             capture_output=True, cwd=ROOT)
        assert said in ran.stderr.decode()


def test_characters_that_a_conversion_lost_are_said(tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("甲\n\ufffd\ufffd乙\n丙\n", encoding="utf-8")
    assert len(textfile.TextFile(str(path), "--flag")) == 3
    assert f"--flag {path}: 1 of 3 lines have U+FFFD, " in (said := capsys.readouterr().err) and said.endswith(":2\n")


@pytest.mark.parametrize("content, said", [
    (SIMPLIFIED.encode() + b"abc\x92def\n" + SIMPLIFIED.encode(),
     "41: not UTF-8 at byte 4 of the line; a stray byte, 0x92, in a file of UTF-8; correct this line"),
    (b"abc\x92def\n" + b"ascii\n" * 9,
     "1: not UTF-8 at byte 4 of the line; a stray byte, 0x92, in a file of UTF-8; correct this line"),
    (SIMPLIFIED.encode()[:-2], "40: not UTF-8 at byte {at} of the line; the file ends within a character: it was cut "
     "off; get it again, or remove its last line"),
    (SIMPLIFIED.encode() + "混进来的一行\n".encode("gbk") * 4, "41: not UTF-8 at byte 1 of the line; 4 of 44 lines are "
     "in another encoding or damaged ({path}:41, {path}:42, {path}:43), the others are UTF-8; correct them, or leave "
     "them out: python scripts/to_tsv.py --input_file {path} --output_file {tsv}")],
    ids=["byte", "byte, ASCII", "cut", "lines"])
def test_a_file_of_utf8_with_something_else_in_it(tmp_path, content, said):
    path, at = tmp_path / "texts.txt", len(SIMPLIFIED.splitlines()[-1].encode()) - 2
    assert wrong(tmp_path, content) == said.format(path=path, tsv=path.with_suffix(".tsv"), at=at)


def test_archives_workbooks_and_what_else_is_no_text(tmp_path):
    book, archive = io.BytesIO(), io.BytesIO()
    for file, name in ((book, "xl/workbook.xml"), (archive, "texts.txt")):
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr(name, SIMPLIFIED)
    for content, kind in ((book.getvalue(), "a workbook of Excel: save it as CSV"),
                          (archive.getvalue(), "a zip archive"),
                          (gzip.compress(b"a"), "compressed by gzip"), (b"PAR1\x15\x04", "a Parquet file")):
        assert wrong(tmp_path, content).startswith(f"1: not UTF-8 text in lines, but {kind}")
    assert wrong(tmp_path, bytes(range(256)) * 4).endswith("; it is damaged, or no text")


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the files of users are not here ({CASES})")
@pytest.mark.parametrize("name, kind", [
    ("big5.txt", "Big5 (90%)"), ("sjis.txt", "Shift-JIS (100%)"), ("gbk.csv", "GBK (100%)"),
    ("utf16_bom.txt", "UTF-16;"), ("utf16le_nobom.txt", "UTF-16 without a BOM"), ("utf32.txt", "UTF-32;"),
    ("book.xlsx", "a workbook of Excel"),
    ("texts.txt.gz", "gzip"), ("one_gbk_line.txt", "1 of 841 lines"), ("utf8_truncated_end.txt", "it was cut off")])
def test_files_of_users_in_other_encodings(name, kind):
    with pytest.raises(InputError) as caught:
        textfile.TextFile(str(CASES / "04-encodings" / name), "--flag")
    assert kind in str(caught.value)
