"""What a file is that is not lines of UTF-8 with tabs between columns: another format by its first lines, another
encoding by the part that fails."""

import codecs
import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from simcse.console import InputError, complain, some
from simcse.files import STDIN

SAMPLE = 100  # lines by which the format is guessed
MOST = 0.9  # of these lines have to agree
MANY = 20  # lines that hardly agree by chance
BLOCK = 1 << 16  # bytes by which the encoding is guessed
FEW, SURE = 8, 0.8  # bytes that are not ASCII and confidence below which no encoding is sure
LABELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
# What columns are called that number the rows; the first is that of pandas' index.
NUMBERING = {"", "id", "_id", "idx", "index", "rank", "line", "qid", "pid", "docid", "doc_id", "query_id", "编号",
             "序号"}
# What columns are called: words of which all are known, so that a text is not taken for a name.
_WORD = ("(?:abstract|anchor|answer|author|body|category|class|comment|content|context|corpus|date|description|doc|"
         "docid|document|duplicate|gold|hard|hypothesis|id|idx|index|is|item|keyword|label|name|neg|negative|paragraph|"
         "passage|pid|pos|positive|premise|product|qid|query|question|rank|relevance|response|review|score|sent|sentence|"
         "sim|similarity|source|string|summary|tag|target|text|title|topic|type|url)s?")
_CHINESE = ("(?:问题|问句|查询|答案|回答|标题|题目|文本|文档|文章|原文|正文|内容|摘要|句子|语句|描述|评论|名称|"
            "正例|负例|标签|编号|序号|关键词|类别|类型|分数|得分|相似度)")
HEADER = re.compile(rf"_?{_WORD}\d?(?:[ _.-](?:{_WORD}|[a-z])\d?)*|[qs][12]|{_CHINESE}\d?", re.I)
OF_TEXTS = {name + end for end in ("", "s") for name in ("text", "content", "sentence", "question", "title", "document",
                                                        "passage", "abstract")} | {"query", "queries", "sent", "doc"}
COLUMNS = {(1,): "a text a line", (2,): "two texts a line, a tab between them",
           (3,): "two texts and a number a line, tabs between them",
           (2, 3): "two texts a line, or two texts and a number, tabs between them",
           (1, 2, 3): "one, two or three texts a line, tabs between them"}
TAKES_TEXTS = {"--text_pair_file": "inference.py --input_file takes texts, one a line",
               "--test_set_file": "--train_set_file takes texts, one a line",
               "--similar_text_pair": "recall.py takes documents, one a line, by --corpus_file, and queries, from "
               "stdin, by --query -"}
MAGIC = {b"\x1f\x8b": "compressed by gzip: gunzip it", b"BZh91AY&SY": "compressed by bzip2: bunzip2 it",
         b"\xfd7zXZ\0": "compressed by xz: unxz it", b"\x28\xb5\x2f\xfd": "compressed by zstd: unzstd it",
         b"7z\xbc\xaf": "a 7z archive: unpack it", b"Rar!\x1a": "a rar archive: unpack it", b"%PDF-": "a PDF, no text",
         b"\xd0\xcf\x11\xe0": "an old workbook or document of Office: save it as CSV, UTF-8",
         b"PAR1\x15": "a Parquet file: pandas makes CSV of it (read_parquet, to_csv)",
         b"\x93NUMPY": "an array of numpy, no text"}
DOCUMENTS = {"version https://git-lfs.github.com/spec/v1": "a Git LFS pointer; git lfs pull puts the file in its place",
             "<!doctype html>": "a page of HTML"}  # by their first line
# Codecs that charset-normalizer may name: as people call them, and for iconv.
ENCODINGS = {"gb18030": ("GBK", "GB18030"), "big5": ("Big5", "BIG5"), "cp932": ("Shift-JIS", "CP932"),
             "euc_jp": ("EUC-JP", "EUC-JP"), "cp949": ("EUC-KR", "CP949"), "big5hkscs": ("Big5-HKSCS", "BIG5-HKSCS"),
             "cp1252": ("Windows-1252 (Latin)", "CP1252"), "cp1250": ("Windows-1250", "CP1250"),
             "cp1251": ("Windows-1251 (Cyrillic)", "CP1251"), "koi8_r": ("KOI8-R", "KOI8-R")}


# ----------------------------------------------------------------------------------------------------- other formats
class Table(NamedTuple):
    """The first rows of a file of another format."""

    what: str
    names: list[str]  # of the columns; without a header their numbers, from 1
    rows: list[list[str]]
    default: list[str]  # the columns that to_tsv.py takes by itself


def refuse_other_formats(lines: Sequence[str], path: str, flag: str, columns: tuple[int, ...]) -> None:
    """InputError where the first lines of a file, without blank ones, are those of JSON, of CSV, or of a table with a
    header or with numbers where texts are needed: what it is, what is needed, and the command that converts it.
    `columns`: the numbers of columns that are taken, of which (1, 2, 3) are training texts."""
    if not lines:
        return
    lines = [line.strip(" \r\n") for line in lines]
    tabs = sum("\t" in line for line in lines)
    where = f"{flag} {'stdin' if path == STDIN else path}"
    needed = f"needed: {COLUMNS.get(columns, f'columns between tabs, one of {columns}')}"
    anyway = "--plain_text takes its lines as they are"
    if kind := document(lines):
        raise InputError(f"{where}: {named(kind, path)}; {needed}; {anyway}")
    delimiters = ",\t" if tabs <= (1 - MOST) * len(lines) else "\t"
    tables = itertools.chain([table_of_objects(lines)], (table(lines, each, columns) for each in delimiters))
    if found := next(filter(None, tables), None):
        options = conversion(found, columns)
        remedy = (f"there are too few columns of texts in it: {some(found.names)}" if options is None
                  else f"{command(path, options)} converts it")
        raise InputError(f"{where}: {found.what}; {needed}; {remedy}; {anyway}")
    if not tabs and flag in TAKES_TEXTS:
        raise InputError(f"{where}: one column; {needed}; {TAKES_TEXTS[flag]}")
    if columns == (1,) and len(lines) >= MANY and (commas := commas_of_each(lines)):
        complain(f"{where}: each of the first {len(lines)} lines has {commas} comma{'s' * (commas > 1)}; if that makes "
             f"columns of it: {command(path, [])}")


def command(path: str, options: Sequence[str]) -> str:
    """The command that converts a file; of stdin the part of the pipe that does."""
    words = ["python", "scripts/to_tsv.py", "--input_file", path, *options]
    if path != STDIN:
        root, end = os.path.splitext(path)
        words += ["--output_file", f"{root}{'_converted' if end == '.tsv' else ''}.tsv"]
    return shlex.join(words)


def named(advice: str, path: str) -> str:
    """A piece of advice with the names of the file and of a new one for FILE and NEW; of stdin as it is."""
    if path == STDIN:
        return advice
    root, end = os.path.splitext(path)
    return advice.replace("FILE", shlex.quote(path)).replace("NEW", shlex.quote(f"{root}_utf8{end}"))


def conversion(found: Table, columns: tuple[int, ...]) -> list[str] | None:
    """The flags with which to_tsv.py makes so many columns of a table; None: it has too few."""
    values = dict(zip(found.names, zip(*found.rows)))
    taken = [name for name in found.names if not numbers_rows(name, values[name]) and any(values[name])]
    options = []
    if not numbers_third(columns):
        if len(taken) == 3 and all(value in LABELS for value in values[taken[2]]):
            options = ["--labels", "positives"]
        else:
            taken = [name for name in taken if not all(map(NUMBER.fullmatch, values[name]))] or taken
    if len(taken) < min(columns):
        return None
    if max(columns) == 1:
        options, taken = [], [max(taken, key=lambda name: sum(map(len, values[name])))]
    elif not options:
        taken = taken[: max(columns)]
    if len(found.names) == 1 and found.what.startswith("CSV"):
        options = ["--format", "csv"]  # a line of commas and quotes may be a text to it
    return [*(["--fields", *taken] if taken != found.default else []), *options]


def numbers_rows(name: str, values: Sequence[str]) -> bool:
    """Whether a column of this name, or number, does nothing but number the rows."""
    return name.rsplit(".", 1)[-1].lower() in NUMBERING or (name == "1" and counts_up(values))


def numbers_third(columns: tuple[int, ...]) -> bool:
    """Whether the third column is of numbers; of training files it is of texts."""
    return 3 in columns and 1 not in columns


def counts_up(values: Sequence[str]) -> bool:
    """Whether the values are n, n + 1 and so on, or many different whole numbers."""
    if len(values) < 3 or not all(map(str.isdecimal, values)):
        return False
    numbers = list(map(int, values))
    return numbers == list(range(numbers[0], numbers[0] + len(values))) or len(set(numbers)) == len(numbers) >= MANY


def names_columns(row: Sequence[str]) -> bool:
    """Whether all fields of a row are what columns are called; the first may have no name, as pandas' index."""
    named = row if row[0] else row[1:]
    return 0 < len(named) == len(set(named)) and all(HEADER.fullmatch(field.strip()) for field in named)


def document(lines: Sequence[str]) -> str | None:
    """What a file is whose lines are parts of a whole, as of one JSON array or object, or are JSON arrays."""
    if kind := DOCUMENTS.get(lines[0].lower()):
        return kind
    advice = "jq -c '.[]' FILE makes lines of an array, and python scripts/to_tsv.py columns of those"
    if lines[0] in ("[", "{", "[{") and len(lines) > 1 and re.match(r'[\[{"]', lines[1].lstrip()):
        return f"a JSON document; {advice}"
    arrays = [found for line in lines if isinstance(found := _json(line), list)]
    if len(arrays) == 1 == len(lines) and arrays[0] and all(isinstance(each, dict) for each in arrays[0]):
        return f"a JSON array; {advice}"
    if len(lines) > 1 and len(arrays) >= MOST * len(lines) and all(
            len(array) > 1 and all(isinstance(each, (str, int, float)) for each in array) for array in arrays):
        return "lines that are JSON arrays; jq -r '@tsv' FILE makes columns of them"
    return None


def _json(line: str) -> Any:
    try:
        return json.loads(line) if line[:1] in "[{" and line else None
    except (ValueError, RecursionError):
        return None


def leaves(found: dict) -> Iterator[tuple[str, Any]]:
    """What a JSON object has in its fields, in the members of lists, and, as a.b, in objects in them."""
    for key, value in found.items():
        for member in (value or [None]) if isinstance(value, list) else [value]:
            if isinstance(member, dict):
                yield from ((f"{key}.{name}", each) for name, each in member.items())
            else:
                yield key, member


def table_of_objects(lines: Sequence[str]) -> Table | None:
    """The table of JSON lines."""
    objects = [found for line in lines if isinstance(found := _json(line), dict) and found]
    if len(objects) < max(1, MOST * len(lines)):
        return None
    firsts = [dict(reversed(list(leaves(found)))) for found in objects]  # of a list the first member
    names = list(dict.fromkeys(path for found in objects for path, _ in leaves(found)))
    rows = [["" if first.get(name) is None else str(first[name]) for name in names] for first in firsts]
    what = "JSON objects, one a line"
    if names[:2] == ["query", "results.rank"]:
        what += ", as recall.py --format jsonl writes them"
    filled = [name for name, values in zip(names, zip(*rows)) if any(values) and not numbers_rows(name, values)]
    return Table(what, names, rows, filled)


def csv_rows(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """The fields, in their quotes, of rows by the grammar of CSV (RFC 4180): quotes stand around whole fields, and are
    doubled within, where alone there are delimiters and line breaks. No rows where more than a few are no such ones."""
    field = rf'"[^"]*(?:""[^"]*)*"|[^"\n{delimiter}]*'
    whole, each = re.compile(rf"(?:{field})(?:{delimiter}(?:{field}))*"), re.compile(rf"(?:^|{delimiter})({field})")
    rows, record, odd = [], [], 0
    for line in lines:
        record.append(line)
        odd ^= line.count('"') % 2
        if not odd:
            text, record = "\n".join(record), []
            rows.append(each.findall(text) if whole.fullmatch(text) else [])
    good = list(filter(None, rows))
    return good if len(record) < len(lines) / 2 and len(good) >= MOST * len(rows) else []


def table(lines: Sequence[str], delimiter: str, columns: tuple[int, ...]) -> Table | None:
    """The table in columns between tabs, or between commas, that lines are known to be; None where they may be texts.
    What makes it known is a header, quotes as CSV has them, or a column of numbers; commas alone do where texts without
    tabs would be refused anyway."""
    rows = csv_rows(lines, delimiter)
    quotes = rows and '"' in "".join(lines)
    if delimiter == "\t":
        rows = rows or [line.split(delimiter) for line in lines]
    width, agree = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
    if not rows or agree < MOST * len(rows):
        return None
    rows = [row for row in rows if len(row) == width]
    in_quotes = [field for row in rows for field in row if field[:1] == '"'] if quotes else []
    values = [[unquoted(field) for field in row] for row in rows] if quotes else rows
    header = has_header(values)
    needs_quotes = sum(delimiter in field or "\n" in field or '""' in field[1:-1] for field in in_quotes)
    if width == 1:  # `"""` is Python's as well
        sure = needs_quotes >= 3 and (names_columns(values[0]) or len(in_quotes) == len(rows))
    else:  # of two rows `"Yes,indeed",she said` may be one
        sure = needs_quotes >= (1 if header or len(rows) >= 5 or delimiter == "\t" else 2) or (
            len(in_quotes) == width * len(rows) and len(rows) > 1)
    kind = {"\t": "TSV", ",": "CSV"}[delimiter]
    names = values[0] if header else [str(number) for number in range(1, width + 1)]
    if sure:
        what = f"{kind} with quotes around fields"
    elif header and (width > 1 or delimiter == "\t"):
        what = f"{kind} with a header, {', '.join(names)}" if width > 1 else f"its first line is a header, {names[0]}"
    elif width > 1 and (odd := odd_column(list(zip(*values)), columns, delimiter)):
        what = f"{kind} {odd}"
    elif width > 1 and delimiter == "," and min(columns) > 1:
        what = "CSV, with commas between columns"
    else:
        return None
    return Table(what, names, values[header:], [name for name in names if not header or name.lower() not in NUMBERING])


def has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row, and no other, has names of columns; of one column a name of texts, no list of words."""
    if len(rows[0]) == 1:
        words = [re.fullmatch(r"\w+", row[0], re.ASCII) for row in rows]
        return len(rows) > 1 and rows[0][0] in OF_TEXTS and not any(words[1:])
    return len(rows) > 1 and names_columns(rows[0]) and not any(map(names_columns, rows[1:]))


def commas_of_each(lines: Sequence[str]) -> int:
    """How many commas each line has, if all have as many and no blank after one; else 0."""
    counts = {line.count(",") for line in lines}
    return counts.pop() if len(counts) == 1 and not any(", " in line for line in lines) else 0


def unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if field[:1] == '"' else field


def odd_column(fields: Sequence[Sequence[str]], columns: tuple[int, ...], delimiter: str) -> str | None:
    """What is said of a column that numbers the rows, or has labels or scores where texts are needed. `fields`: of each
    column; one row between commas may end in a number by chance, several hardly."""
    first, *_, last = fields
    numbers = [all(map(NUMBER.fullmatch, column)) for column in fields]
    if counts_up(first) and not all(numbers):
        return "with rows numbered by its first column"
    if delimiter == "\t" and numbers_third(columns):
        return None
    if numbers == [False, False, True] and (delimiter == "\t" or len(last) >= 5
                                              or (len(last) > 1 and set(last) <= set(LABELS))):
        return f"with numbers in its third column ({some(list(dict.fromkeys(last)), 3)}): labels or scores of pairs"
    for place, column, number in (("first", first, numbers[0]), ("last", last, numbers[-1])):
        if number and len(column) >= 5 * len(set(column)):
            return f"with a few numbers in its {place} column ({some(list(dict.fromkeys(column)), 3)}): labels"
    return None


# --------------------------------------------------------------------------------------------------------- encodings
def known_bytes(head: bytes) -> str | None:
    """What a file is by its first bytes, if it is no lines of text in an encoding without NUL bytes."""
    if head.startswith(b"PK\x03\x04"):
        return ("a workbook of Excel: save it as CSV, UTF-8; python scripts/to_tsv.py converts that" if b"xl/" in head
                else "a zip archive: unzip it")
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    # The BOM of UTF-32 begins with that of UTF-16 or with NUL bytes; of English in UTF-16 every second byte is one.
    bom = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return wide(head) if bom or head.count(0) > len(head) / 4 else None


def wide(head: bytes) -> str | None:
    """UTF-32 or UTF-16, with or without BOM; None: neither."""
    found = {}
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        try:
            text = codecs.getincrementaldecoder(name)().decode(head).removeprefix("\ufeff")
        except UnicodeDecodeError:
            continue
        plain = sum(character.isprintable() or character.isspace() for character in text)
        if text and plain >= MOST * len(text):
            found[name] = len(re.findall(r"[\0-\x7f\u3000-\u30ff\u4e00-\u9fff\uff00-\uff65]", text))
    if not found:
        return None
    # Hardly anything else is valid UTF-32; of UTF-16 that order of bytes is right which gives more common characters.
    name = next(iter(found)) if "UTF-32" in next(iter(found)) else max(found, key=found.get)
    marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    return f"it looks like {name[:6]}{'' if marked else ' without a BOM'}; {iconv(name[:6] if marked else name)}"


def not_utf8(path: str, line: bytes, error: UnicodeDecodeError) -> str:
    """Why a line is not UTF-8, and what to do: by the whole file or, of stdin and pipes, by the line."""
    if not os.path.isfile(path):
        return known_bytes(line) or guess([line])
    with open(path, "rb") as file:
        head = file.read(BLOCK)
        if found := known_bytes(head) or (wide(head) if b"\0" in head else None):
            return found
        file.seek(0)
        bad, size, lines, others, last = [], 0, 0, 0, b""
        for last in (line for chunk in file for line in chunk.splitlines()):
            lines += 1
            try:
                last.decode("utf-8")
                others += not last.isascii()
            except UnicodeDecodeError:
                bad.append((lines, last if size < BLOCK else b""))
                size += len(last)
    if not bad:  # it was changed meanwhile
        return guess([line])
    stray = stray_bytes(bad[0][1])
    if len(bad) == 1 and last is bad[0][1] and error.reason == "unexpected end of data" and others:
        return "the file ends within a character: it was cut off; get it again, or remove its last line"
    if len(bad) == 1 and len(stray) == 1 and lines > 1:
        return f"a stray byte, 0x{stray.hex()}, in a file of UTF-8; correct this line"
    if others > len(bad):
        where = ", ".join(f"{path}:{row}" for row, _ in bad[:3])
        return (f"{len(bad)} of {lines} lines are in another encoding or damaged ({where}), the others are UTF-8; "
                f"correct them, or leave them out: {command(path, [])}")
    return guess([each for _, each in bad if each])


def stray_bytes(line: bytes) -> bytes:
    """The bytes of a line that are not UTF-8."""
    return bytes(ord(character) - 0xDC00 for character in line.decode("utf-8", "surrogateescape")
                 if "\udc80" <= character <= "\udcff")


def encodings(lines: Sequence[bytes]) -> dict[str, float]:
    """The codecs that fit lines of which none is UTF-8, the best first, each with the confidence, from 0 to 1, that
    charset-normalizer has in it; those that fit clearly less than the best are left out."""
    from charset_normalizer import from_bytes

    content = b"\n".join(lines)
    if not content or len(re.findall(rb"[\0-\x08\x0e-\x1b]", content)) > len(content) / 50:
        return {}
    among = list(ENCODINGS)
    found = from_bytes(content, cp_isolation=among) or from_bytes(content, cp_isolation=among, threshold=1 - SURE / 2)
    fits = sorted(found, key=lambda each: (each.chaos, -each.coherence, among.index(each.encoding)))
    return {each.encoding: 1 - each.chaos for each in fits
            if each.chaos < fits[0].chaos + 0.1 and each.coherence > fits[0].coherence - 0.1}


def guess(lines: Sequence[bytes]) -> str:
    """The encoding of lines of which none is UTF-8, and how to convert it; where several fit, which they are: a wrong
    one makes other characters of the text, without an error."""
    found = encodings(lines)
    if not found:
        return "it is damaged, or no text"
    said = [f"{ENCODINGS[codec][0]} ({sure:.0%})" for codec, sure in list(found.items())[:3]]
    name = ENCODINGS[next(iter(found))][1]
    if len(found) > 1 or max(found.values()) < SURE or len(re.findall(rb"[\x80-\xff]", b"".join(lines))) < FEW:
        return (f"charset-normalizer: it may be {' or '.join(said)}; look whether it reads well before you convert it: "
                f"iconv -f {name} -t UTF-8 FILE | head")
    return f"it looks like {said[0]} to charset-normalizer; {iconv(name)}"


def iconv(name: str) -> str:
    return f"convert it: iconv -f {name} -t UTF-8 FILE > NEW"
