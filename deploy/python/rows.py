"""Read the rows of a tab-separated file, and print a line of results for each."""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from predictor import InputError

# The first line of JSON, or of CSV with quoted cells or with a header.
OTHER_FORMAT = re.compile(rb'\s*(\{".*|\[\s*[{"].*|"[^"]*"(,"[^"]*")+|[A-Za-z_]+(,[A-Za-z_]+)+)\s*')
LINE_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")  # what any program ends a line or a field at


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: file:line.
        texts: the texts of the row, without white space around them.
        problem: why the row has no result; None: it has one.
    """

    place: str
    texts: list[str]
    problem: str | None = None


def part(number: int, total: int, noun: str) -> str:
    """Return how many of all, with their verb, as in "1 of 1,000 texts is" or "2 of 2 lines are"."""
    nouns = noun if total == 1 else f"{noun}s"
    return f"{number:,} of {total:,} {nouns} {'is' if number == 1 else 'are'}"


def read_rows(path: str, columns: int, *, strict: bool) -> list[Row]:
    """Read a tab-separated UTF-8 file, and warn of its blank and malformed rows.

    Args:
        columns: texts of a row.
        strict: raise at the first blank or malformed row instead.

    Raises:
        InputError: the file cannot be read, is not UTF-8, is JSON or CSV, is empty, or has more malformed rows than
            good ones.
    """
    try:
        lines = Path(path).read_bytes().splitlines()  # of bytes: at \n, \r\n and \r, nowhere else
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}") from None
    if lines and OTHER_FORMAT.fullmatch(lines[0]):
        raise InputError(f"{path}:1: looks like JSON or CSV; write one text a line, with a tab between two texts")
    rows = []
    for number, line in enumerate(lines, 1):
        row = parse_row(line, f"{path}:{number}", columns)
        if row.problem and strict:
            raise InputError(f"{row.place}: {row.problem} (--strict_data)")
        rows.append(row)
    bad = [row for row in rows if row.problem]
    malformed = [row for row in bad if row.problem != "blank"]
    good = len(rows) - len(bad)
    examples = ", ".join(f"{row.place} ({row.problem})" for row in bad[:3])
    report = f"{path}: {part(len(bad), len(rows), 'line')} blank or malformed: {examples}"
    if len(malformed) > good:
        raise InputError(report)
    if not good:
        raise InputError(f"{path}: the file is empty")
    if bad:
        them = "it" if len(bad) == 1 else "them"
        print(f"{report}; no result (NaN, empty or null); fix or remove {them}", file=sys.stderr)
    return rows


def parse_row(line: bytes, place: str, columns: int) -> Row:
    """Split a line into its texts, and say what is wrong with them."""
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 at byte {error.start + 1} of the line; convert it from its encoding: "
                         "iconv -f ENCODING -t UTF-8 FILE > NEW") from None
    decoded = decoded.replace("\ufeff", "")  # byte order marks, also where files were joined
    fields = [field.strip() for field in decoded.split("\t")]
    problem = None
    if not any(fields):
        problem = "blank"
    elif len(fields) != columns:
        problem = f"columns: {len(fields)} instead of {columns}"
    elif not all(fields):
        problem = "an empty field"
    last = "\t".join(fields[columns - 1 :])
    return Row(place, [*fields[: columns - 1], last], problem)


def one_line(text: str) -> str:
    """Return a text with a blank in place of tabs and line breaks."""
    return LINE_BREAKS.sub(" ", text).strip()


def print_results(output_format: str | None, names: tuple[str, ...], rows: list[Row], values: list) -> None:
    """Print a line for each row.

    Args:
        output_format: "tsv", "jsonl", or None, which prints the values alone.
        names: the fields of jsonl.
        values: a number, or a list of numbers, for each row; NaN where there is none.
    """
    for row, value in zip(rows, values):
        missing = bool(np.isnan(value).any())
        if output_format is None:
            print(value)
        elif output_format == "tsv":
            numbers = value if isinstance(value, list) else [value]
            last = "" if missing else " ".join(map(str, numbers))
            print(*map(one_line, row.texts), last, sep="\t")
        elif output_format == "jsonl":
            fields = dict(zip(names, [*row.texts, None if missing else value]))
            line = json.dumps(fields, ensure_ascii=False)
            # json leaves these three as they are, and some programs end a line there.
            print(line.translate({0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}))
        else:
            raise ValueError(output_format)
