"""Files that are not UTF-8 text in columns: which format or encoding they have, and the command that converts them."""

import codecs
import csv
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from simcse.console import InputError, settings, some
from simcse.files import STDIN

HEAD_BYTES = 1 << 16  # of a file, by which binary formats and encodings are known
SAMPLE = 100  # lines of a file, by which formats of text are known
MOST = 0.9  # of these lines have to agree
CORPUS_COLUMNS = (1, 2)  # a text, or an id and a text
# What a file has to be, by the numbers of columns that its reader takes.
EXPECTED = {(1,): "one text per line",
            CORPUS_COLUMNS: "one text per line, or an id, a tab and a text",
            (2,): "two texts per line, with a tab between them",
            (3,): "two texts and a number per line, with tabs between them",
            (2, 3): "two texts, or two texts and a number, per line, with tabs between them",
            (1, 2, 3): "one, two or three texts per line, with tabs between them"}
ICONV = "convert it: iconv -f {} -t UTF-8 FILE > NEW"  # FILE and NEW are filled in where the file has a name


# ------------------------------------------------------------------------------------------------------ binary formats
class BinaryFormat(NamedTuple):
    """A format that is known by the first bytes of a file, and how to convert it."""

    matches: Callable[[bytes], bool]
    remedy: str


def _starts_with(*signatures: bytes) -> Callable[[bytes], bool]:
    """Return a function that tells whether bytes start with any of these."""
    return lambda head: head.startswith(signatures)


def _is_workbook(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04") and b"xl/" in head


# The first that matches is it: a workbook is a zip archive, and the BOM of UTF-32 begins with that of UTF-16.
BINARY_FORMATS = {
    "compressed by gzip": BinaryFormat(_starts_with(b"\x1f\x8b"), "gunzip it"),
    "compressed by bzip2": BinaryFormat(_starts_with(b"BZh91AY&SY"), "bunzip2 it"),
    "an Excel workbook": BinaryFormat(_is_workbook, "save it as CSV UTF-8 and convert that with "
                                      "python scripts/to_tsv.py"),
    "a zip archive": BinaryFormat(_starts_with(b"PK\x03\x04"), "unzip it"),
    "UTF-32": BinaryFormat(_starts_with(codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), ICONV.format("UTF-32")),
    "UTF-16": BinaryFormat(_starts_with(codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), ICONV.format("UTF-16")),
    "UTF-16 without a BOM, little-endian": BinaryFormat(
        lambda head: _utf16_without_bom(head) == "UTF-16LE", ICONV.format("UTF-16LE")),
    "UTF-16 without a BOM, big-endian": BinaryFormat(
        lambda head: _utf16_without_bom(head) == "UTF-16BE", ICONV.format("UTF-16BE"))}


def _utf16_without_bom(head: bytes) -> str | None:
    """Return "UTF-16LE" or "UTF-16BE" if most characters of the text are common ones in that order of bytes."""
    few_nuls = head.count(0) <= len(head) / 4  # of English in UTF-16 every second byte is NUL, of Chinese line feeds
    if b"\0" not in head or (few_nuls and _decode_head(head, "UTF-8") is not None):
        return None
    for name in ("UTF-16LE", "UTF-16BE"):
        text = _decode_head(head, name) or ""
        common = re.findall(r"[\t\n\r -~\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uff65]", text)
        if text and len(common) >= MOST * len(text):
            return name
    return None


def _decode_head(head: bytes, encoding: str) -> str | None:
    """Return the text of bytes that may end within a character; None: they are not in this encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None


def name_binary_format(head: bytes) -> str | None:
    """Return what a file is by its first bytes, and how to convert it; None: it may be lines of text."""
    for name, binary_format in BINARY_FORMATS.items():
        if binary_format.matches(head):
            return f"{name}; {binary_format.remedy}"
    return None


# ----------------------------------------------------------------------------------------------------- other encodings
# The codecs among which charset-normalizer chooses: as people call them, and for iconv.
ENCODINGS = {"gb18030": ("GBK", "GB18030"), "big5": ("Big5", "BIG5"), "cp932": ("Shift-JIS", "CP932"),
             "euc_jp": ("EUC-JP", "EUC-JP"), "cp949": ("EUC-KR", "CP949"), "big5hkscs": ("Big5-HKSCS", "BIG5-HKSCS"),
             "cp1252": ("Windows-1252 (Latin)", "CP1252"), "cp1250": ("Windows-1250", "CP1250"),
             "cp1251": ("Windows-1251 (Cyrillic)", "CP1251"), "koi8_r": ("KOI8-R", "KOI8-R")}
FEW_BYTES = 8  # that are not ASCII: by so few no encoding is sure
SURE = 0.8  # below this confidence neither
CLOSE = 0.1  # an encoding that fits so much less than the best may be it as well
CUT_OFF = "the file ends within a character: it was cut off; get it again, or remove its last line"


def explain_not_utf8(path: str, line: bytes, error: UnicodeDecodeError) -> str:
    """Return why a line is not UTF-8, and what to do, by all lines of its file; of a pipe by this line."""
    ends_within_character = error.reason == "unexpected end of data"
    if not os.path.isfile(path):
        if ends_within_character and not line[: error.start].isascii():
            return CUT_OFF
        return _name_encoding(line)
    with open(path, "rb") as file:
        total = 0  # lines
        utf8 = 0  # lines of UTF-8 that are not ASCII
        wrong = []  # numbers of the lines that are not UTF-8
        wrong_content = bytearray()  # the first of these
        for content in (part for chunk in file for part in chunk.splitlines()):
            total += 1
            if not _is_utf8(content):
                wrong.append(total)
                if len(wrong_content) < HEAD_BYTES:
                    wrong_content += content + b"\n"
            elif not content.isascii():
                utf8 += 1
    is_mostly_utf8 = utf8 >= len(wrong) or (len(wrong) == 1 and not line[: error.start].isascii())
    if is_mostly_utf8 and wrong == [total] and ends_within_character:
        return CUT_OFF
    if is_mostly_utf8:
        places = some([f"{path}:{number}" for number in wrong], 3)
        return f"{len(wrong)} of {total} lines are not UTF-8 ({places}), the others are; fix or remove them"
    return _name_encoding(bytes(wrong_content))


def _is_utf8(content: bytes) -> bool:
    """Return whether bytes are whole characters of UTF-8."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def guess_encodings(content: bytes) -> dict[str, float]:
    """Return the codecs that fit text that is not UTF-8, best first, with charset-normalizer's confidence in each.

    A codec whose confidence is clearly less than that in the best one is left out. {}: the content is not text.
    """
    from charset_normalizer import from_bytes

    control_characters = re.findall(rb"[\0-\x08\x0e-\x1b]", content)
    if not content or len(control_characters) > len(content) / 50:  # a text has hardly any
        return {}
    names = list(ENCODINGS)
    matches = from_bytes(content, cp_isolation=names) or from_bytes(content, cp_isolation=names, threshold=0.6)
    matches = sorted(matches, key=lambda match: (match.chaos, -match.coherence, names.index(match.encoding)))
    fitting = {}
    for match in matches:
        if match.chaos < matches[0].chaos + CLOSE and match.coherence > matches[0].coherence - CLOSE:
            fitting[match.encoding] = 1 - match.chaos
    return fitting


def _name_encoding(content: bytes) -> str:
    """Return the encoding of lines of which none is UTF-8, and how to convert them.

    Where several encodings fit, they are all named: a wrong one makes other characters of the text without an error.
    """
    fitting = guess_encodings(content)
    if not fitting:
        return "it is damaged, or no text"
    named = [f"{ENCODINGS[codec][0]} ({confidence:.0%})" for codec, confidence in fitting.items()]
    iconv_name = ENCODINGS[next(iter(fitting))][1]
    few = len(re.findall(rb"[\x80-\xff]", content)) < FEW_BYTES
    if few or len(fitting) > 1 or max(fitting.values()) < SURE:
        return (f"charset-normalizer: it may be {' or '.join(named[:3])}; look whether it reads well before you "
                f"convert it: iconv -f {iconv_name} -t UTF-8 FILE | head")
    return f"it looks like {named[0]} to charset-normalizer; {ICONV.format(iconv_name)}"


# ----------------------------------------------------------------------------------------------------- formats of text
class Table(NamedTuple):
    """The first rows of a file in another format of text.

    Attributes:
        description: what the file is, for messages.
        names: of its columns; their numbers, from 1, where no header names them.
        rows: the fields, as many as there are names, without the header.
    """

    description: str
    names: list[str]
    rows: list[list[str]]


def find_json_objects(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of lines of which most are JSON objects."""
    objects = [found for found in map(_parse_object, lines) if found]
    if len(objects) < max(1, MOST * len(lines)):
        return None
    names = []
    for name in dict.fromkeys(name for found in objects for name in found):
        if any(first_value(found.get(name)) for found in objects):
            names.append(name)
    rows = [[first_value(found.get(name)) for name in names] for found in objects]
    return Table(f"JSON objects with {some(names)}", names, rows)


def _parse_object(line: str) -> dict | None:
    try:
        found = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def first_value(value: object) -> str:
    """Return a value of a JSON object as text, of a list its first member; "" for none."""
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def find_csv(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of CSV: it has quoted cells or a header of ASCII names; without these its lines may be texts.

    Where there have to be tabs between texts, and the lines have none, commas are enough.
    """
    lack_tabs = min(columns) > 1 and not any("\t" in line for line in lines)
    return _find_cells(lines, ",", "CSV", needs_quotes=not lack_tabs)


def find_quoted_tsv(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of TSV whose cells have quotes as those of CSV."""
    return _find_cells(lines, "\t", "quoted TSV", needs_quotes=True)


def _find_cells(lines: Sequence[str], delimiter: str, kind: str, *, needs_quotes: bool) -> Table | None:
    records = _parse_cells(lines, delimiter)
    widths = Counter(len(cells) for _, cells in records)
    width, agreeing = widths.most_common(1)[0] if widths else (0, 0)
    if len(records) < 2 or width < 2 or agreeing < MOST * len(records):
        return None
    rows = [cells for _, cells in records if len(cells) == width]
    sentences = sum(any(cell.startswith(" ") for cell in cells) for cells in rows)
    if delimiter == "," and 2 * sentences > len(rows):  # a blank follows the commas of sentences
        return None
    unquoted_is_known = delimiter == "," and (is_header(rows) or not needs_quotes)
    if not unquoted_is_known and not _has_quoted_cells(records, delimiter):
        return None
    names, rows = _split_header(rows, width)
    return Table(f"{kind} with the columns {some(names)}", names, rows)


def _parse_cells(lines: Sequence[str], delimiter: str) -> list[tuple[str, list[str]]]:
    """Return the records of CSV, each as its raw text and its cells; none if a line's quotes are not those of CSV."""
    records, start = [], 0
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            raw = "\n".join(lines[start : reader.line_num])
            records.append((raw, cells))
            start = reader.line_num
    except csv.Error as error:
        if str(error) != "unexpected end of data":  # the last line of the sample is within a cell
            return []
    return records


def _has_quoted_cells(records: Sequence[tuple[str, list[str]]], delimiter: str) -> bool:
    """Return whether a cell needs its quotes, for a delimiter, a line break or a quote in it, or all cells have some.

    Quotes around other cells may be those of a text.
    """
    for raw, cells in records:
        unquoted = delimiter.join(cells) != raw
        if unquoted and any(character in cell for cell in cells for character in (delimiter, "\n", '"')):
            return True
    between = f'"{delimiter}"'
    return all(raw == f'"{between.join(cells)}"' for raw, cells in records)


def is_header(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the first row, and no other, has ASCII names of columns, such as sent0 or hard_neg."""
    name = re.compile(r"\s*[A-Za-z_][\w.-]*\s*", re.ASCII)
    named = [all(name.fullmatch(field) for field in row) for row in rows]
    return len(rows) > 1 and named[0] and not any(named[1:]) and len(set(rows[0])) == len(rows[0])


def _split_header(rows: list[list[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns, which are numbers if the first row does not name them, and the other rows."""
    if is_header(rows):
        return rows[0], rows[1:]
    return [str(number) for number in range(1, width + 1)], rows


def find_labels(lines: Sequence[str], columns: tuple[int, ...]) -> Table | None:
    """Return the table of texts with a label or score behind them: a third column, or a second one of a corpus.

    None where the third column has to be a number.
    """
    if 3 in columns and 1 not in columns:
        return None
    width = 2 if columns == CORPUS_COLUMNS else 3
    rows = [line.split("\t") for line in lines]
    rows = [row for row in rows if len(row) == width]
    total = len(lines) - 1 if is_header(rows) else len(lines)
    names, rows = _split_header(rows, width)
    labelled = [row for row in rows if is_number(row[-1]) and not any(map(is_number, row[:-1]))]
    if not labelled or len(labelled) < MOST * total:
        return None
    labels = list(dict.fromkeys(row[-1] for row in labelled))
    return Table(f"texts with labels or scores in column {width} ({some(labels, 3)})", names, labelled)


def is_number(text: str) -> bool:
    """Return whether a text is a decimal number."""
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text.strip()) is not None


# What finds a format in the first lines of a file; scripts/to_tsv.py converts each. The first that finds one is it.
FORMATS: dict[str, Callable[[Sequence[str], tuple[int, ...]], Table | None]] = {
    "jsonl": find_json_objects, "csv": find_csv, "quoted_tsv": find_quoted_tsv, "labelled_tsv": find_labels}


def check_lines(lines: Iterator[tuple[int, str]], name: str, flag: str,
                columns: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, unless the first ones show another format.

    Of stdin, where somebody waits for the answer to each line, only the first line with text is looked at.

    Raises:
        InputError: as `check_format`.
    """
    size = 1 if name == "stdin" else SAMPLE
    first: list[tuple[int, str]] = []
    with_text = 0
    for number, line in lines:
        first.append((number, line))
        with_text += bool(line.strip())
        if with_text == size:
            break
        if name == "stdin":
            yield first.pop()
    check_format([line for _, line in first], name, flag, columns)
    yield from first
    yield from lines


def check_format(lines: Sequence[str], name: str, flag: str, columns: tuple[int, ...]) -> None:
    """Refuse the first lines of a file in another format, unless --plain_text.

    Args:
        lines: in which blank ones do not count.
        name: of the file, or "stdin".
        flag: that named it.
        columns: the numbers of columns that its reader takes; (1, 2, 3) for training texts.

    Raises:
        InputError: names the format, what the reader takes, and the command that converts the file.
    """
    lines = [line.strip(" \r\n") for line in lines if line.strip()]
    if settings.plain_text or not lines:
        return
    for find_table in FORMATS.values():
        table = find_table(lines, columns)
        if table:
            raise InputError(f"{flag} {name}: the file has {table.description}; expected {EXPECTED[columns]}; "
                             f"convert it: {_command(name, _conversion_flags(table, columns))}; --plain_text reads "
                             "its lines as they are")


# ------------------------------------------------------------------------------------------------------------ commands
LABELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0}
ID_NAMES = ("id", "_id")  # of columns that are no texts


def _conversion_flags(table: Table, columns: tuple[int, ...]) -> list[str]:
    """Return the flags with which scripts/to_tsv.py makes so many columns of a table."""
    values = dict(zip(table.names, zip(*table.rows)))
    ids = [name for name in table.names if name in ID_NAMES]
    numbers = [name for name in table.names if name not in ids and all(map(is_number, values[name]))]
    texts = [name for name in table.names if name not in ids + numbers] or table.names
    flags = []
    if columns == CORPUS_COLUMNS or max(columns) == 1:
        longest = max(texts, key=lambda name: sum(map(len, values[name])))
        fields = [longest]
        if columns == CORPUS_COLUMNS and ids:
            fields = [ids[0], longest]
    elif len(texts) == 2 and len(numbers) == 1:
        fields = texts + numbers
        if 1 in columns or 3 not in columns:  # the third column may not be a label
            if all(label in LABELS for label in values[numbers[0]]):
                flags = ["--labels", "positives"]
            else:
                fields = texts
    else:
        fields = texts[: max(columns)]
    if fields != table.names:
        flags = ["--fields", *fields, *flags]
    return flags


def _is_pipe(path: str) -> bool:
    """Return whether a path is stdin or a pipe, which no command can read again."""
    return path == "stdin" or (os.path.exists(path) and not os.path.isfile(path))


def _command(path: str, flags: Sequence[str]) -> str:
    """Return the command that converts a file; of a pipe the part of it that does."""
    if _is_pipe(path):
        return shlex.join(["python", "scripts/to_tsv.py", "--input_file", STDIN, *flags])
    stem, extension = os.path.splitext(path)
    target = f"{stem}_converted.tsv" if extension == ".tsv" else f"{stem}.tsv"
    return shlex.join(["python", "scripts/to_tsv.py", "--input_file", path, *flags, "--output_file", target])


def fill_in_names(advice: str, path: str) -> str:
    """Return a piece of advice with the names of the file and of a new one for FILE and NEW; of a pipe as it is."""
    if _is_pipe(path):
        return advice
    stem, extension = os.path.splitext(path)
    return advice.replace("FILE", shlex.quote(path)).replace("NEW", shlex.quote(f"{stem}_utf8{extension}"))
