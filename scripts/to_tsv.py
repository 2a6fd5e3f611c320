"""Convert CSV, JSON lines or labelled pairs to what the scripts read: UTF-8, a row a line, tabs between columns.

    python scripts/to_tsv.py --input_file train.csv --output_file recall/train.csv
    python scripts/to_tsv.py --input_file train.jsonl --fields query pos neg --output_file recall/train.csv
    python scripts/to_tsv.py --input_file labelled.tsv --labels positives --output_file recall/train.csv

It reads CSV and TSV, with quotes and line breaks in cells, and JSON lines. Every run of white space in a text becomes a
blank. A log on stderr tells what the file was taken for and which rows were skipped. The input is UTF-8; iconv converts
other encodings. It needs no paddle.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TextIO

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.console import InputError
from simcse.files import STDIN, check_not_input, check_writable, new_file
from simcse.text import formats
from simcse.text.formats import LABELS
from simcse.text.lines import read_lines
from simcse.text.textfile import Row, RowReport

# How the csv module reads each format of cells.
DIALECTS = {
    "csv": {"delimiter": ","},
    "quoted_tsv": {"delimiter": "\t"},
    "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
CELL_CHARACTERS = 1 << 24  # in one cell at most: a quote that is never closed does not take all of a large file
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can have, and UTF-8 cannot
Line = tuple[int, str]  # its number, from 1, and its text


class Columns(NamedTuple):
    """The columns to write.

    Attributes:
        names: names or numbers from 1; keys of JSON objects.
        rows: the rows with these fields, some of them with a problem.
    """

    names: list[str]
    rows: Iterator[Row]


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_file", type=lambda path: path if path == STDIN else flags.readable_file(path),
                        required=True, help="file to convert; -: stdin")
    parser.add_argument("--output_file", type=flags.nonempty_text, default=STDIN,
                        help="file to write, with tabs between columns; -: stdout (default: %(default)s)")
    parser.add_argument("--format", choices=(*DIALECTS, "jsonl"),
                        help="csv: commas between cells; quoted_tsv: tabs between cells, with quotes as in CSV; tsv: "
                        "tabs between fields; jsonl: a JSON object a line (default: by the first lines)")
    parser.add_argument("--header", choices=("yes", "no"),
                        help="whether the first row names the columns (default: yes if it has only ASCII names)")
    parser.add_argument("--fields", type=flags.nonempty_text, nargs="+",
                        help="columns to write, in this order: names of the header, numbers from 1, or keys of the "
                        "JSON objects, whose lists give a row for each member (default: all)")
    parser.add_argument("--labels", choices=("positives", "negatives"),
                        help="of rows of text, text and label, write; positives: the texts with label 1; negatives: "
                        "text, a text with label 1 and one with label 0, for each two of them (default: all rows)")
    flags.add_strict_argument(parser)
    args = parser.parse_args()
    if args.output_file != STDIN:
        check_writable(args.output_file, "--output_file")
        check_not_input(args.output_file, "--output_file", {"--input_file": args.input_file})
    if args.format == "jsonl" and args.header:
        parser.error("--header is for csv and tsv")
    args.input_name = "stdin" if args.input_file == STDIN else args.input_file
    args.output_name = "stdout" if args.output_file == STDIN else args.output_file
    return args


# ------------------------------------------------------------------------------------------------------------- formats
def read_columns(args: argparse.Namespace) -> Columns:
    """Return the columns of the input, whose format the first lines show where --format does not say it.

    Raises:
        InputError: the file has no text, or a column of --fields is missing.
    """
    lines = iter(read_lines(args.input_file, "--input_file", args.input_name))
    first_lines = list(itertools.islice(lines, formats.SAMPLE_LINES))
    sample = [line.strip(" \r\n") for _, line in first_lines if line.strip()]
    if not sample:
        raise InputError(f"--input_file {args.input_name}: the file is empty")
    format = args.format
    if format is None:
        format = guess_format(sample)
        console.log(f"{args.input_name}: read as {format}")
    lines = itertools.chain(first_lines, lines)
    if format == "jsonl":
        return read_objects(args, lines)
    return read_cells(args, split_lines(lines, format, f"--input_file {args.input_name}"))


def guess_format(sample: Sequence[str]) -> str:
    """Return the format of a file by its first lines."""
    for name in ("jsonl", "csv", "quoted_tsv"):
        if formats.FORMATS[name](sample, (2, 3)):
            return name
    return "tsv"


def split_lines(lines: Iterable[Line], format: str, where: str) -> Iterator[Row]:
    """Yield the rows of csv, quoted_tsv or tsv that are not blank, each with the number of its first line.

    Raises:
        InputError: the quotes of a row are not those of CSV.
    """
    csv.field_size_limit(CELL_CHARACTERS)
    reader = csv.reader((f"{line}\n" for _, line in lines), strict=True, **DIALECTS[format])
    while True:
        first_line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{where}:{first_line}: the quotes of this row are not those of CSV: {error}; fix them, "
                             "or read quotes as text with --format tsv") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield Row(first_line, cells)


def read_cells(args: argparse.Namespace, rows: Iterator[Row]) -> Columns:
    """Return the columns that --fields chooses of rows of cells, of which the first may be a header."""
    sample = list(itertools.islice(rows, formats.SAMPLE_LINES))
    header = [cell.strip() for cell in sample[0].fields]
    if has_header(args, sample):
        names = header
        rows = itertools.chain(sample[1:], rows)
    else:
        names = [str(number) for number in range(1, len(header) + 1)]
        rows = itertools.chain(sample, rows)
    places = find_columns(args.fields or names, names, args.input_name)
    return Columns([names[place] for place in places], select_cells(rows, len(names), places))


def has_header(args: argparse.Namespace, sample: Sequence[Row]) -> bool:
    """Return whether the first row names the columns: as --header says, or --fields by names, or as it looks."""
    if args.header:
        return args.header == "yes"
    are_named = any(not field.isdecimal() for field in args.fields or [])
    header = are_named or formats.is_header([row.fields for row in sample])
    first = [cell.strip() for cell in sample[0].fields]
    console.log(f"{args.input_name}: the first row is {'a' if header else 'no'} header, --header "
                f"{'no' if header else 'yes'} if that is wrong: {console.some(first)[:60]}")
    return header


def find_columns(fields: Sequence[str], names: Sequence[str], input_name: str) -> list[int]:
    """Return the places of the columns that --fields gives by name or by number.

    Raises:
        InputError: there is no such column.
    """
    places = []
    for field in fields:
        if field in names:
            places.append(names.index(field))
        elif field.isdecimal() and 1 <= int(field) <= len(names):
            places.append(int(field) - 1)
        else:
            raise InputError(f"--fields {field}: no such column in {input_name}; there are {', '.join(names)}")
    return places


def select_cells(rows: Iterable[Row], width: int, places: Sequence[int]) -> Iterator[Row]:
    """Yield the cells of each row at these places; a row that has not `width` cells has a problem."""
    for number, cells, _ in rows:
        if len(cells) == width:
            yield clean(number, [cells[place] for place in places])
        else:
            yield Row(number, cells, f"columns: {len(cells)} instead of {width}")


def read_objects(args: argparse.Namespace, lines: Iterable[Line]) -> Columns:
    """Return the values of the keys that --fields chooses of JSON objects."""
    lines = ((number, line) for number, line in lines if line.strip())
    sample = list(itertools.islice(lines, formats.SAMPLE_LINES))
    keys = args.fields
    if not keys:
        table = formats.find_json_objects([line.strip() for _, line in sample], (1,))
        keys = table.names if table else []
    return Columns(keys, select_values(itertools.chain(sample, lines), keys))


def select_values(lines: Iterable[Line], keys: Sequence[str]) -> Iterator[Row]:
    """Yield the values that the JSON object on each line has of some keys; a list gives a row for each member."""
    for number, line in lines:
        try:
            content = json.loads(line)
            members = [members_of(content, key) for key in keys]
        except (ValueError, RecursionError) as error:
            yield Row(number, [line], str(error))
            continue
        for fields in itertools.product(*members):
            yield clean(number, fields)


def members_of(content: object, key: str) -> list[str]:
    """Return the text of a JSON object's key, or of each member of its list.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(content, dict):
        raise ValueError("JSON, but no object")
    value = content.get(key)
    members = value if isinstance(value, list) else [value]
    if value is None or not members:
        raise ValueError(f"no {key}")
    if any(isinstance(member, (dict, list)) for member in members):
        raise ValueError(f"{key} is no text")
    return [str(int(member)) if isinstance(member, bool) else str(member) for member in members]


def clean(number: int, fields: Sequence[str]) -> Row:
    """Return a row whose fields have a blank for every run of white space, with its problem if it has one."""
    fields = [" ".join(field.split()) for field in fields]
    problem = None
    if not all(fields):
        problem = "an empty field"
    elif any(SURROGATE.search(field) for field in fields):
        problem = "half of a surrogate pair"
    return Row(number, fields, problem)


# -------------------------------------------------------------------------------------------------------------- labels
def check_labels(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows of text, text and label; a row whose label is neither 0 nor 1 has a problem."""
    for row in rows:
        if row.problem is None and row.fields[2] not in LABELS:
            row = row._replace(problem=f"label {row.fields[2]!r} is neither 0 nor 1")
        yield row


def keep_positives(rows: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """Yield text and text of the rows of text, text and label whose label is 1."""
    for query, text, label in rows:
        if LABELS[label] == 1:
            yield [query, text]


def combine_negatives(rows: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """Yield text, positive and negative for each two texts that rows of text, text and label have of a text.

    A text with both labels is a positive.
    """
    labels_of: dict[str, dict[str, int]] = {}
    for query, text, label in rows:
        labels = labels_of.setdefault(query, {})
        labels[text] = max(LABELS[label], labels.get(text, 0))
    without_negatives = 0
    for query, labels in labels_of.items():
        positives = [text for text, label in labels.items() if label == 1]
        negatives = [text for text, label in labels.items() if label == 0]
        if not negatives:
            without_negatives += len(positives)
        for positive, negative in itertools.product(positives, negatives):
            yield [query, positive, negative]
    if without_negatives:
        console.log(f"left out {console.count(without_negatives, 'pair')} of label 1 whose first text has none of "
                    "label 0")


# What makes the fields to write of those of all rows, by --labels.
SELECTIONS: dict[str | None, Callable[[Iterable[Sequence[str]]], Iterable[Sequence[str]]]] = {
    None: lambda rows: rows,
    "positives": keep_positives,
    "negatives": combine_negatives,
}


# -------------------------------------------------------------------------------------------------------------- output
def skip_malformed(rows: Iterable[Row], report: RowReport) -> Iterator[list[str]]:
    """Yield the fields of the rows that have no problem; the report warns of the others at the end."""
    for row in rows:
        report.add(row)
        if row.problem is None:
            yield row.fields
    report.finish()


def open_output(path: str) -> contextlib.AbstractContextManager[TextIO]:
    """Return stdout for "-", else a new file that takes its place when all is written."""
    if path == STDIN:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        return contextlib.nullcontext(sys.stdout)
    return new_file(path, flag="--output_file")


def main() -> None:
    args = parse_args()
    names, rows = read_columns(args)
    if args.labels:
        if len(names) != 3:
            raise InputError(f"--labels needs text, text and label, not {', '.join(names)}; choose three columns with "
                             "--fields")
        rows = check_labels(rows)
    report = RowReport("--input_file", args.input_name, keep_malformed=False)
    written = 0
    with open_output(args.output_file) as file:
        for fields in SELECTIONS[args.labels](skip_malformed(rows, report)):
            file.write("\t".join(fields) + "\n")
            written += 1
        if not written:
            raise InputError(f"--input_file {args.input_name}: --labels {args.labels} leaves no pair")
    columns = "" if args.labels else f" of {', '.join(names)}"
    console.log(f"wrote {console.count(written, 'line')}{columns} to {args.output_name}")


if __name__ == "__main__":
    console.run(main)
