"""Read the rows of a tab-separated file, and print a line of results for each."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from predictor import InputError

# What any program takes for the end of a line, and tabs.
LINE_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
JSON_OR_CSV = re.compile(rb'\{".*\}|\[\{.*|"[^"]*"(,"[^"]*")+')


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: file:line.
        fields: the texts of the row, without white space around them.
        problem: why the row has no result; None: it has one.
    """

    place: str
    fields: list[str]
    problem: str | None = None


def read_rows(path: str, columns: int, flag: str, *, strict: bool) -> list[Row]:
    """Read a tab-separated UTF-8 file, and warn of its blank and malformed rows.

    Args:
        columns: texts of a row.
        flag: what names the file on the command line, for messages.
        strict: raise at the first blank or malformed row instead.

    Raises:
        InputError: the file cannot be read, is not UTF-8 or is of another format; it has no good row, or more malformed
            rows than good ones.
    """
    where = f"{flag} {path}"
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()  # of bytes: at \n, \r\n and \r, nowhere else
    except OSError as error:
        raise InputError(f"{where}: {error.strerror.lower()}") from None
    first_line = next((line.strip() for line in lines if line.strip()), b"")
    if JSON_OR_CSV.fullmatch(first_line):
        raise InputError(f"{where}: the file looks like JSON or CSV; write one text a line, a tab between two texts")
    rows = []
    for number, line in enumerate(lines, 1):
        row = parse_row(decode(line, f"{where}:{number}"), f"{path}:{number}", columns)
        if row.problem and strict:
            raise InputError(f"{where}:{number}: {row.problem} (--strict_data)")
        rows.append(row)
    report_problems(rows, where)
    return rows


def decode(line: bytes, place: str) -> str:
    """Return the text of a UTF-8 line; raise InputError with a guess at what else it is."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
            advice = "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
        elif line.startswith((b"\x1f\x8b", b"PK")):
            advice = "the file is compressed, or a workbook: unpack it, or save it as text"
        else:  # a wrong guess at the encoding would give other texts without an error
            advice = "convert it from its encoding: iconv -f ENCODING -t UTF-8 FILE > NEW"
        raise InputError(f"{place}: not UTF-8 at byte {error.start + 1} of the line; {advice}") from None


def parse_row(line: str, place: str, columns: int) -> Row:
    """Split a line into its fields, and say what is wrong with them."""
    line = line.replace("\ufeff", "")  # byte order marks, also where files were joined
    fields = [field.strip() for field in line.split("\t")]
    if not any(fields):
        return Row(place, fields, "blank")
    if len(fields) != columns:
        return Row(place, fields, f"columns: {len(fields)} instead of {columns}")
    if not all(fields):
        return Row(place, fields, "an empty field")
    return Row(place, fields)


def report_problems(rows: Sequence[Row], where: str) -> None:
    """Warn of rows with problems; raise InputError where none is good, or more are malformed than good."""
    bad = [row for row in rows if row.problem]
    blank = sum(row.problem == "blank" for row in bad)
    malformed = len(bad) - blank
    good = len(rows) - len(bad)
    if not good and not malformed:
        raise InputError(f"{where}: the file is empty")
    examples = ", ".join(f"{row.place} ({row.problem})" for row in bad[:3])
    report = f"{len(bad)} of {len(rows)} lines are blank or malformed: {examples}"
    if malformed > good:
        raise InputError(f"{where}: {report}")
    if bad:
        print(f"{where}: {report}; they have no result (NaN, empty or null); fix or remove them", file=sys.stderr)


def one_line(text: str) -> str:
    """Return a text with a blank in place of tabs and line breaks."""
    return LINE_BREAKS.sub(" ", text).strip()


def print_results(output_format: str | None, names: Sequence[str], results: Iterable[Sequence[Any]]) -> None:
    """Print a line for each row.

    Args:
        output_format: "tsv", "jsonl", or None, which prints the results alone.
        names: the fields of jsonl.
        results: the texts of each row, and a number or a list of numbers, NaN where there is none.
    """
    for *texts, numbers in results:
        missing = bool(np.isnan(numbers).any())
        if output_format is None:
            print(numbers)
        elif output_format == "tsv":
            cells = [one_line(text) for text in texts]
            cells.append("" if missing else format_numbers(numbers))
            print(*cells, sep="\t")
        elif output_format == "jsonl":
            fields = dict(zip(names, [*texts, None if missing else numbers]))
            line = json.dumps(fields, ensure_ascii=False)
            # json leaves these three as they are, and some programs end a line there.
            print(line.translate({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}))
        else:
            raise ValueError(output_format)


def format_numbers(numbers: float | list[float]) -> str:
    """Return a number, or numbers with blanks between them."""
    if isinstance(numbers, list):
        return " ".join(str(number) for number in numbers)
    return str(numbers)
