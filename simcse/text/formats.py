"""Name the format or the encoding of a file that is not UTF-8 text in columns, and the command that converts it."""

import codecs
import csv
import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from simcse.console import InputError, part, settings, some
from simcse.files import STDIN

HEAD_BYTES = 1 << 16  # first bytes of a file, which show binary formats and encodings
SAMPLE_LINES = 100  # first lines of a file, which show formats of text
MOST = 0.9  # share of these lines that have to agree
CORPUS_COLUMNS = (1, 2)  # a text, or an id and a text
# What a file has to be, by the numbers of columns that its reader takes.
EXPECTED = {
    (1,): "one text per line",
    CORPUS_COLUMNS: "one text per line, or an id, a tab and a text",
    (2,): "two texts per line, with a tab between them",
    (3,): "two texts and a number per line, with tabs between them",
    (2, 3): "two texts, or two texts and a number, per line, with tabs between them",
    (1, 2, 3): "one, two or three texts per line, with tabs between them",
}
LABELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0}
ID_NAMES = ("id", "_id")  # columns with these names are not texts
# What no id has, and nearly any text: four Chinese characters, or three words.
SENTENCE = re.compile(r"(?:[\u4e00-\u9fff][^\u4e00-\u9fff]*){4}|\w+ \w+ \w+")


# ------------------------------------------------------------------------------------------------------ binary formats
ZIP = b"PK\x03\x04"
# The first bytes of each format, its name and how to convert it.
ARCHIVES = {
    b"\x1f\x8b": "compressed by gzip; gunzip it",
    b"BZh91AY&SY": "compressed by bzip2; bunzip2 it",
    ZIP: "a zip archive; unzip it",
}
WORKBOOK = "an Excel workbook; save it as CSV UTF-8 and convert that with python scripts/to_tsv.py"
# UTF-32 is first: its little-endian BOM begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
WITHOUT_BOM = {"UTF-16LE": "little-endian", "UTF-16BE": "big-endian"}
# Characters of English, Chinese, Japanese and Korean text.
COMMON = re.compile(r"[\t\n\r -~\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uff65]")


def name_binary_format(head: bytes, name: str) -> str | None:
    """Return the format of a file and how to convert it; None: it may be lines of text.

    Args:
        head: the first bytes of the file.
        name: of the file, for the command.
    """
    if head.startswith(ZIP) and b"xl/" in head:
        return WORKBOOK
    for signature, description in ARCHIVES.items():
        if head.startswith(signature):
            return description
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return f"{encoding}; {_convert_encoding(encoding, name)}"
    for encoding, byte_order in WITHOUT_BOM.items():
        if _is_utf16(head, encoding):
            return f"UTF-16 without a BOM, {byte_order}; {_convert_encoding(encoding, name)}"
    return None


def _is_utf16(head: bytes, encoding: str) -> bool:
    """Return whether bytes are text in UTF-16LE or UTF-16BE: most of their characters are common ones.

    Every ASCII character and every line feed has a NUL in UTF-16. Text in UTF-8 may have a few.
    """
    if b"\0" not in head:
        return False
    if head.count(0) <= len(head) / 4 and _decode_head(head, "UTF-8"):
        return False
    text = _decode_head(head, encoding)
    return text != "" and len(COMMON.findall(text)) >= MOST * len(text)


def _decode_head(head: bytes, encoding: str) -> str:
    """Return the text of bytes that may end within a character; "": they are not in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return ""


# ----------------------------------------------------------------------------------------------------- other encodings
# Python's codecs among which charset-normalizer chooses, and what users call them; of those that fit equally well the
# first is named first.
ENCODINGS = {
    "gb18030": "GBK",
    "big5": "Big5",
    "cp932": "Shift-JIS",
    "euc_jp": "EUC-JP",
    "cp949": "EUC-KR",
    "cp1252": "Windows-1252 (Latin)",
    "cp1250": "Windows-1250",
    "cp1251": "Windows-1251 (Cyrillic)",
    "koi8_r": "KOI8-R",
}
CLOSE = 0.1  # an encoding whose confidence is at most this much below the best one's may be right as well
CUT_OFF = "the file ends within a character: it was cut off; get it again, or remove its last line"
CONTROL_CHARACTERS = re.compile(rb"[\0-\x08\x0e-\x1b]")


def explain_not_utf8(path: str, name: str, line: bytes, error: UnicodeDecodeError) -> str:
    """Return why a line is not UTF-8, and what to do about it.

    Args:
        path: the file, all of whose lines are looked at; of a pipe only `line` is.
        name: the file's name in messages.
        line: the first line that is not UTF-8.
        error: the error of decoding it.
    """
    begins_in_utf8 = not line[: error.start].isascii()
    ends_within_character = error.reason == "unexpected end of data"
    if not os.path.isfile(path):
        if begins_in_utf8 and ends_within_character:
            return CUT_OFF
        return _name_encoding(line, name)
    total = 0
    utf8 = 0  # lines that are UTF-8 and not ASCII
    wrong = []  # numbers of the lines that are not UTF-8
    wrong_content = bytearray()  # the first of these lines
    with open(path, "rb") as file:
        for content in itertools.chain.from_iterable(chunk.splitlines() for chunk in file):
            total += 1
            if not _is_utf8(content):
                wrong.append(total)
                if len(wrong_content) < HEAD_BYTES:
                    wrong_content += content + b"\n"
            elif not content.isascii():
                utf8 += 1
    is_mostly_utf8 = utf8 >= len(wrong) or (len(wrong) == 1 and begins_in_utf8)
    if not is_mostly_utf8:
        return _name_encoding(bytes(wrong_content), name)
    if wrong == [total] and ends_within_character:
        return CUT_OFF
    places = some([f"{name}:{number}" for number in wrong], 3)
    return f"{part(len(wrong), total, 'line', 'are')} not UTF-8 ({places}), the others are; fix or remove them"


def _is_utf8(line: bytes) -> bool:
    """Return whether bytes are whole characters of UTF-8."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _name_encoding(content: bytes, name: str) -> str:
    """Return the encoding of lines that are not UTF-8, and how to convert them.

    If several encodings fit, all are named: with a wrong one iconv writes other characters and no error.
    """
    fitting = _guess_encodings(content)
    if not fitting:
        return "it is damaged, or no text"
    named = [f"{ENCODINGS[codec]} ({confidence:.0%})" for codec, confidence in fitting.items()]
    best = next(iter(fitting))
    iconv_name = best.upper().replace("_", "-")
    if len(fitting) > 1:
        return (f"charset-normalizer: it may be {' or '.join(named[:3])}; look whether it reads well before you "
                f"convert it: {_iconv(iconv_name, name)} | head")
    return f"it looks like {named[0]} to charset-normalizer; {_convert_encoding(iconv_name, name)}"


def _guess_encodings(content: bytes) -> dict[str, float]:
    """Return the codecs that fit text, best first, with charset-normalizer's confidence; {}: it is not text."""
    from charset_normalizer import from_bytes

    if len(CONTROL_CHARACTERS.findall(content)) > len(content) / 50:  # text has hardly any
        return {}
    rank = list(ENCODINGS).index
    matches = from_bytes(content, cp_isolation=list(ENCODINGS))
    matches = sorted(matches, key=lambda match: (match.chaos, rank(match.encoding)))
    return {match.encoding: 1 - match.chaos for match in matches if match.chaos < matches[0].chaos + CLOSE}


# ----------------------------------------------------------------------------------------------------- formats of text
class Table(NamedTuple):
    """The first rows of a file in another format of text.

    Attributes:
        description: what the file has, for messages.
        names: of its columns; their numbers, from 1, if there is no header.
        rows: the fields, as many as there are names, without the header.
        advice: what to do; "": convert it by scripts/to_tsv.py.
    """

    description: str
    names: list[str]
    rows: list[list[str]]
    advice: str = ""


def find_json_objects(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of JSON lines, without the keys that never have a value; None: they are something else."""
    objects = [parsed for parsed in map(_parse_object, lines) if parsed]
    if not objects or len(objects) < MOST * len(lines):
        return None
    names = []
    for name in dict.fromkeys(key for parsed in objects for key in parsed):
        if any(_first_value(parsed.get(name)) for parsed in objects):
            names.append(name)
    rows = [[_first_value(parsed.get(name)) for name in names] for parsed in objects]
    return Table(f"JSON objects with {some(names)}", names, rows)


def _parse_object(line: str) -> dict | None:
    """Return the JSON object that a line is; None: it is something else."""
    if not line.startswith("{"):
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _first_value(value: object) -> str:
    """Return a value of a JSON object as text, the first one of a list; "": there is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


class _Record(NamedTuple):
    """A row of CSV: its text, which may have several lines, and its cells."""

    text: str
    cells: list[str]


def find_csv(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of CSV; None: the lines are something else.

    CSV has quoted cells or a header. Without these, lines with commas may be texts, unless the file has to have tabs
    and has none. If most lines have a blank behind a comma, they are sentences.
    """
    records = _parse_records(lines, ",")
    rows = [record.cells for record in records]
    sentences = [cells for cells in rows if any(cell.startswith(" ") for cell in cells)]
    if not rows or len(sentences) > len(rows) / 2:
        return None
    lacks_tabs = min(columns) > 1 and not any("\t" in line for line in lines)
    if lacks_tabs or is_header(rows) or _has_quoted_cells(records, ","):
        return _make_table("CSV", rows)
    return None


def find_quoted_tsv(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of TSV whose cells are quoted as in CSV; None: the lines are something else."""
    records = _parse_records(lines, "\t")
    if records and _has_quoted_cells(records, "\t"):
        return _make_table("quoted TSV", [record.cells for record in records])
    return None


def _parse_records(lines: Sequence[str], delimiter: str) -> list[_Record]:
    """Return the records of CSV, those with as many cells as most have.

    Returns:
        []: the quotes are not those of CSV, there is one record or one column, or the numbers of cells differ.
    """
    records, start = [], 0
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            records.append(_Record("\n".join(lines[start : reader.line_num]), cells))
            start = reader.line_num
    except csv.Error as error:
        if str(error) != "unexpected end of data":  # the last line of the sample is within a cell
            return []
    widths = Counter(len(record.cells) for record in records)
    width = max(widths, key=widths.get, default=0)
    if len(records) < 2 or width < 2 or widths[width] < MOST * len(records):
        return []
    return [record for record in records if len(record.cells) == width]


def _has_quoted_cells(records: Sequence[_Record], delimiter: str) -> bool:
    """Return whether a cell needs its quotes, for a delimiter, a line break or a quote in it, or all cells have some.

    Quotes around other cells may be those of a text.
    """
    for text, cells in records:
        has_quotes = delimiter.join(cells) != text
        if has_quotes and re.search(f'[{delimiter}\n"]', "".join(cells)):
            return True
    between_cells = f'"{delimiter}"'
    return all(text == f'"{between_cells.join(cells)}"' for text, cells in records)


def is_header(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the first row, and no other, has ASCII names of columns, such as sent0 or hard_neg."""
    name = re.compile(r"\s*[A-Za-z_][\w.-]*\s*", re.ASCII)
    has_names = [all(name.fullmatch(field) for field in row) for row in rows]
    return len(rows) > 1 and has_names[0] and not any(has_names[1:]) and len(set(rows[0])) == len(rows[0])


def _make_table(description: str, rows: list[list[str]]) -> Table:
    """Return the table of rows, of which the first may be a header."""
    if is_header(rows):
        names, rows = rows[0], rows[1:]
    else:
        names = [str(number) for number in range(1, len(rows[0]) + 1)]
    return Table(f"{description} with the columns {some(names)}", names, rows)


def find_labels(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of texts with a label or a score behind them; None: there are none, or the reader takes them.

    It is the third column, and of a corpus the second.
    """
    if _takes_labels(columns):
        return None
    width = 2 if columns == CORPUS_COLUMNS else 3
    rows = [line.split("\t") for line in lines]
    rows = [row for row in rows if len(row) == width]
    if not rows:
        return None
    table = _make_table("texts", rows)
    labelled = [row for row in table.rows if is_number(row[-1]) and not any(map(is_number, row[:-1]))]
    total = len(lines) - (len(rows) - len(table.rows))  # without a header
    if not labelled or len(labelled) < MOST * total:
        return None
    labels = list(dict.fromkeys(row[-1] for row in labelled))
    return Table(f"texts with labels or scores in column {width} ({some(labels, 3)})", table.names, labelled)


def find_texts_as_ids(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of two columns of which the first has texts, where ids are expected; None: there are no such."""
    if columns != CORPUS_COLUMNS:
        return None
    rows = [line.split("\t") for line in lines]
    rows = [row for row in rows if len(row) == 2 and SENTENCE.search(row[0])]
    if len(rows) < MOST * len(lines):
        return None
    return Table("two columns, and texts instead of ids in the first", ["1", "2"], rows,
                 "pairs of query and target are given by --similar_text_pair; of other files give one column, as "
                 "cut -f1 writes it, or put the ids first; --corpus_columns 2 or --plain_text reads these texts as ids")


def _takes_labels(columns: tuple[int, ...]) -> bool:
    """Return whether the third column of a file has to be a label or a score; of training texts it is a text."""
    return 3 in columns and 1 not in columns


def is_number(text: str) -> bool:
    """Return whether a text is a decimal number."""
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text.strip()) is not None


# The function that finds each format in the first lines of a file. The first format that is found counts.
FORMATS: dict[str, Callable[[Sequence[str], tuple[int, ...]], Table | None]] = {
    "jsonl": find_json_objects,
    "csv": find_csv,
    "quoted_tsv": find_quoted_tsv,
    "labelled_tsv": find_labels,
    "texts_as_ids": find_texts_as_ids,
}


def check_lines(lines: Iterator[tuple[int, str]], name: str, flag: str,
                columns: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, unless the first ones show another format.

    Of stdin, where somebody waits for the answer to each line, only the first line with text is looked at.

    Raises:
        InputError: as `check_format`.
    """
    size = 1 if name == "stdin" else SAMPLE_LINES
    waiting: list[tuple[int, str]] = []
    with_text = 0
    for number, line in lines:
        waiting.append((number, line))
        with_text += bool(line.strip())
        if with_text == size:
            break
        if name == "stdin":
            yield waiting.pop()
    check_format([line for _, line in waiting], name, flag, columns)
    yield from waiting
    yield from lines


def check_format(lines: Sequence[str], name: str, flag: str, columns: tuple[int, ...]) -> None:
    """Refuse a file whose first lines are in another format, unless --plain_text is set.

    Args:
        lines: the first ones; blank ones do not count.
        name: of the file, or "stdin".
        flag: the flag that named it.
        columns: the numbers of columns that its reader takes; (1, 2, 3) for training texts.

    Raises:
        InputError: the file has another format; the message has the command that converts it.
    """
    lines = [line.strip(" \r\n") for line in lines if line.strip()]
    if settings.plain_text or not lines:
        return
    for find_table in FORMATS.values():
        table = find_table(lines, columns)
        if table:
            advice = table.advice or (f"convert it: {_to_tsv(name, _conversion_flags(table, columns))}; --plain_text "
                                      "reads its lines as they are")
            raise InputError(f"{flag} {name}: the file has {table.description}; expected {EXPECTED[columns]}; {advice}")


# ------------------------------------------------------------------------------------------------------------ commands
def _conversion_flags(table: Table, columns: tuple[int, ...]) -> list[str]:
    """Return the flags with which scripts/to_tsv.py makes one of these numbers of columns of a table."""
    values = dict(zip(table.names, zip(*table.rows)))
    ids = [name for name in table.names if name in ID_NAMES]
    numbers = [name for name in table.names if name not in ids and all(map(is_number, values[name]))]
    texts = [name for name in table.names if name not in ids + numbers] or table.names
    is_labelled = len(texts) == 2 and len(numbers) == 1
    longest = max(texts, key=lambda name: sum(map(len, values[name])))
    selection = []
    if columns == (1,):
        fields = [longest]
    elif columns == CORPUS_COLUMNS:
        fields = [*ids[:1], longest]
    elif is_labelled and _takes_labels(columns):
        fields = texts + numbers
    elif is_labelled and all(label in LABELS for label in values[numbers[0]]):
        fields = texts + numbers
        selection = ["--labels", "positives"]
    else:
        fields = texts[: max(columns)]
    if fields == table.names:
        return selection
    return ["--fields", *fields, *selection]


def _is_pipe(name: str) -> bool:
    """Return whether a name is that of stdin or of a pipe, which no command can read again."""
    return name == "stdin" or (os.path.exists(name) and not os.path.isfile(name))


def _to_tsv(name: str, flags: Sequence[str]) -> str:
    """Return the command by which scripts/to_tsv.py converts a file, or a pipe to stdout."""
    if _is_pipe(name):
        return shlex.join(["python", "scripts/to_tsv.py", "--input_file", STDIN, *flags])
    stem, extension = os.path.splitext(name)
    target = f"{stem}_converted.tsv" if extension == ".tsv" else f"{stem}.tsv"
    return shlex.join(["python", "scripts/to_tsv.py", "--input_file", name, *flags, "--output_file", target])


def _iconv(encoding: str, name: str) -> str:
    """Return the command that prints a file in UTF-8; of a pipe, which has no name, FILE."""
    file = "FILE" if _is_pipe(name) else shlex.quote(name)
    return f"iconv -f {encoding} -t UTF-8 {file}"


def _convert_encoding(encoding: str, name: str) -> str:
    """Return the advice to convert a file to UTF-8 by a command."""
    stem, extension = os.path.splitext(name)
    target = "NEW" if _is_pipe(name) else shlex.quote(f"{stem}_utf8{extension}")
    return f"convert it: {_iconv(encoding, name)} > {target}"
