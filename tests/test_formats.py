"""Files that are not what the scripts read: named, with the command that converts them; and texts that only look so."""

import bz2
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
        formats.check_format(content.splitlines(), path, flag, columns)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(f"{flag} ")
        return str(error)
    return None


def table(delimiter, *columns, rows=12):
    return "".join(delimiter.join(column.format(row) for column in columns) + "\n" for row in range(rows))


JSONL = "".join(json.dumps({"_id": f"d{row}", "title": "", "text": f"文本{row}"}) + "\n" for row in range(3))
TRIPLES = "".join(json.dumps({"query": f"问{row}", "pos": [f"答{row}"], "neg": ["甲", "乙"]}) + "\n"
                  for row in range(3))
OTHERS = [  # content, columns, what it is, flags of the command
    ('sent0,sent1,hard_neg\r\n甲,"乙,丙",丁\r\n戊,己,庚\r\n', TRAINING,
     "CSV with the columns sent0, sent1, hard_neg;", ""),
    ("sent0,sent1,hard_neg\n甲,乙,丁\n戊,己,庚\n", TRAINING,
     "CSV with the columns sent0, sent1, hard_neg;", ""),
    ("sent0,sent1,hard_neg\n甲,乙,丁\n戊,己,庚\n", (2,), "CSV with the columns", "--fields sent0 sent1 "),
    ('"id","content"\r\n"0","一\r\n\r\n二"\r\n"1","三"\r\n', (1,), "CSV with the columns", "--fields content "),
    ('"id","content"\r\n"0","一\r\n\r\n二"\r\n"1","三"\r\n', (1, 2), "CSV with the columns id, content;", ""),
    ('id,sent0,sent1\r\n0,"甲,乙",丙\n1,丁,戊\n', TRAINING, "CSV with the columns", "--fields sent0 sent1 "),
    ("甲,乙\n丙,丁\n", (2,), "CSV with the columns 1, 2;", ""),
    ('问题,答案\n"甲,乙",丙\n', (2,), "CSV with the columns 1, 2;", ""),
    ('甲,"乙,丙",1\n丙,丁,0\n戊,己,1\n' * 2, TRAINING, "CSV with the columns 1, 2, 3;", "--labels positives "),
    ('"甲"\t"乙"\n"丙"\t"丁"\n', (2,), "quoted TSV with the columns 1, 2;", ""),
    ('甲\t"乙 ""丙"""\n丁\t戊\n', (2,), "quoted TSV with the columns 1, 2;", ""),
    ("甲\t乙\t1\n丙\t丁\t0\n", TRAINING, "texts with labels or scores in column 3 (1, 0);", "--labels positives "),
    ("甲\t乙\t1\n丙\t丁\t0\n", (2,), "texts with labels or scores in column 3", "--labels positives "),
    ("甲\t乙\t0.83\n丙\t丁\t0.5\n", TRAINING, "texts with labels or scores in column 3", "--fields 1 2 "),
    ("sentence1\tsentence2\tlabel\n甲\t乙\t1\n丙\t丁\t0\n", TRAINING, "texts with labels", "--labels positives "),
    ("甲乙\t0.5\n丙丁\t0.25\n", (1, 2), "texts with labels or scores in column 2 (0.5, 0.25);", "--fields 1 "),
    (JSONL, (1,), "JSON objects with _id, text;", "--fields text "),
    (JSONL, (1, 2), "JSON objects with _id, text;", ""),
    (TRIPLES, TRAINING, "JSON objects with query, pos, neg;", ""),
    (TRIPLES, (2,), "JSON objects with query, pos, neg;", "--fields query pos ")]


@pytest.mark.parametrize("content, columns, what, flags", OTHERS, ids=map(str, range(len(OTHERS))))
def test_another_format_is_named_and_its_command_makes_what_is_read(tmp_path, monkeypatch, content, columns, what,
                                                                    flags):
    path = tmp_path / "in.csv"
    path.write_bytes(content.encode())
    said = refused(content, columns, path=str(path))
    assert said.startswith(f"--flag {path}: the file has {what}") and f" expected {formats.EXPECTED[columns]}; " in said
    command, rest = re.fullmatch("--flag .* convert it: (python scripts/to_tsv.py .*?); (.*)", said).groups()
    assert rest == "--plain_text reads its lines as they are"
    assert f"in.csv {flags}--output_file" in command
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    to_tsv.main()
    made = (tmp_path / "in.tsv").read_text(encoding="utf-8")
    assert refused(made, columns) is None and made.split("\n")[0].count("\t") + 1 in columns


TEXTS = [
    '他说:"你好, 世界"\n"引号"在前面\n在后面是"引号"\n', '"全在引号里"\n"也在,引号里"\n',
    '"Yes, indeed," she said.\n"No," he said.\n',
    "0,甲\n1,乙\n2,丙\n", "一句\n" + '"甲,乙"\n' * 3, "[{\n},\n{\n}]\n", "{'text': '甲'}\n{'text': '乙'}\n",
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
        columns = textfile.choose_columns(str(path), "--flag", (2, 3) if path.stem == "dev_labeled" else TRAINING)
        assert sum(1 for _ in textfile.read_rows(str(path), columns, "--flag")) > 100


def test_both_readers_refuse_and_a_flag_reads_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl"
    path.write_text(JSONL, encoding="utf-8")
    for read in (read_texts, textfile.TextFile, lambda *to: textfile.choose_columns(*to, TRAINING)):
        with pytest.raises(InputError, match=r"--flag .*corpus.jsonl: the file has JSON objects .*corpus.tsv; "):
            read(str(path), "--flag")
    lines = JSONL.splitlines()
    with console.accept_all_lines():
        assert read_texts(path) == list(textfile.TextFile(str(path), "--flag")) == lines
        assert textfile.choose_columns(str(path), "--flag", TRAINING) == 1
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--plain_text"])
    flags.add_data_arguments(parser := flags.ArgumentParser("Reads."))
    parser.parse_args()
    assert console.settings.plain_text
    console.settings.plain_text = False


def test_of_stdin_only_the_first_line_with_text_is_looked_at():
    lines = list(enumerate(["甲,乙", "", '1,"甲, 乙"', '{"text": "甲"}', '{"text": "乙"}'], 1))
    assert list(formats.check_lines(iter(lines), "stdin", "--flag", (1,))) == lines
    blank_first = iter([(1, ""), (2, '{"text": "甲"}')])
    assert next(blank := formats.check_lines(blank_first, "stdin", "--flag", (1,))) == (1, "")
    with pytest.raises(InputError, match="--flag stdin: the file has JSON objects"):
        next(blank)


def test_the_first_line_of_stdin_is_looked_at():
    code = "from simcse.text import textfile; print(next(textfile.read_rows('-', 1, '--input_file')).fields)"
    for given, out in (('{"text": "甲"}\n', "stdin: the file has JSON objects with text; expected one text per line; "
                        "convert it: python scripts/to_tsv.py --input_file -; "), ('"a,b",c\n', "['\"a,b\",c']")):
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
    (SIMPLIFIED, "utf-16-le", "UTF-16 without a BOM, little-endian;"),
    (SIMPLIFIED, "utf-16-be", "UTF-16 without a BOM, big-endian;"),
    ("没有换行的一行中文文本,带逗号", "utf-16-be", "UTF-16 without a BOM, big-endian;"),
    (ENGLISH, "utf-16-le", "UTF-16 without a BOM, little-endian;"),
    (SIMPLIFIED, "utf-32", "UTF-32;"), (ENGLISH, "utf-16", "UTF-16;")])
def test_the_command_for_an_encoding_gives_the_text(tmp_path, text, encoding, kind):
    said = wrong(tmp_path, text.encode(encoding))
    assert f"it looks like {kind}" in said or f"not UTF-8 text, but {kind}" in said
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
    for given, said in (("甲\n乙\t丙\n丁\n", "--flag /dev/stdin: 1 of 3 lines is malformed: /dev/stdin:2 "),
                        (JSONL, "to_tsv.py --input_file - --fields text; "),
                        ("你好世\udce7\udc95", ":1: not UTF-8 at byte 10 of the line; the file ends within a char")):
        ran = subprocess.run([sys.executable, "-c", code], input=given.encode("utf-8", "surrogateescape"),
                             capture_output=True, cwd=ROOT)
        assert said in ran.stderr.decode()


def test_characters_that_a_conversion_lost_are_said(tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("甲\n\ufffd\ufffd乙\n丙\n", encoding="utf-8")
    assert len(textfile.TextFile(str(path), "--flag")) == 3
    assert f"--flag {path}: 1 of 3 lines has U+FFFD, " in (said := capsys.readouterr().err) and said.endswith(":2\n")


@pytest.mark.parametrize("content, said", [
    (SIMPLIFIED.encode() + b"abc\x92def\n" + SIMPLIFIED.encode(),
     "41: not UTF-8 at byte 4 of the line; 1 of 81 lines is not UTF-8 ({path}:41), the others are; fix or remove "
     "them"),
    (SIMPLIFIED.encode()[:-2], "40: not UTF-8 at byte {at} of the line; the file ends within a character: it was cut "
     "off; get it again, or remove its last line"),
    (SIMPLIFIED.encode() + "混进来的一行\n".encode("gbk") * 4, "41: not UTF-8 at byte 1 of the line; 4 of 44 lines are "
     "not UTF-8 ({path}:41, {path}:42, {path}:43 and 1 more), the others are; fix or remove them")],
    ids=["byte", "cut", "lines"])
def test_a_file_of_utf8_with_something_else_in_it(tmp_path, content, said):
    path, at = tmp_path / "texts.txt", len(SIMPLIFIED.splitlines()[-1].encode()) - 2
    assert wrong(tmp_path, content) == said.format(path=path, at=at)


def test_archives_workbooks_and_what_else_is_no_text(tmp_path):
    book, archive = io.BytesIO(), io.BytesIO()
    for file, name in ((book, "xl/workbook.xml"), (archive, "texts.txt")):
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr(name, SIMPLIFIED)
    for content, kind in ((book.getvalue(), "an Excel workbook; save it as CSV"),
                          (archive.getvalue(), "a zip archive; unzip it"),
                          (gzip.compress(b"a"), "compressed by gzip; gunzip it"),
                          (bz2.compress(b"a"), "compressed by bzip2; bunzip2 it")):
        assert wrong(tmp_path, content).startswith(f"1: not UTF-8 text, but {kind}")
    for content in (bytes(range(256)) * 4, b"\x98\xff\x81\xa0\n"):
        assert wrong(tmp_path, content).endswith("; it is damaged, or no text")


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the files of users are not here ({CASES})")
@pytest.mark.parametrize("name, kind", [
    ("big5.txt", "Big5 (90%)"), ("sjis.txt", "Shift-JIS (100%)"), ("gbk.csv", "GBK (100%)"),
    ("utf16_bom.txt", "UTF-16;"), ("utf16le_nobom.txt", "UTF-16 without a BOM"), ("utf32.txt", "UTF-32;"),
    ("book.xlsx", "an Excel workbook"),
    ("texts.txt.gz", "gzip"), ("one_gbk_line.txt", "1 of 841 lines"), ("utf8_truncated_end.txt", "it was cut off")])
def test_files_of_users_in_other_encodings(name, kind):
    with pytest.raises(InputError) as caught:
        textfile.TextFile(str(CASES / "04-encodings" / name), "--flag")
    assert kind in str(caught.value)
