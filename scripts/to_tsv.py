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

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.console import InputError
from simcse.files import STDIN, new_file
from simcse.text import formats
from simcse.text.formats import LABELS
from simcse.text.lines import read_lines
from simcse.text.textfile import Row, RowReport

DELIMITERS = {"csv": ",", "quoted_tsv": "\t"}
CELL_CHARACTERS = 1 << 24  # of a cell at most, so that a quote that is never closed does not take all of a large file
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can have, and UTF-8 cannot
Lines = Iterable[tuple[int, str]]  # numbers, from 1, and lines


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_file", type=lambda path: path if path == STDIN else flags.readable_file(path),
                        required=True, help="file to convert; -: stdin")
    parser.add_argument("--output_file", type=flags.nonempty_text, default=STDIN,
                        help="file to write, with tabs between columns; -: stdout (default: %(default)s)")
    parser.add_argument("--format", choices=("csv", "quoted_tsv", "tsv", "jsonl"),
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
    if os.path.isdir(args.output_file):
        parser.error(f"argument --output_file: {args.output_file}: is a directory")
    if args.format == "jsonl" and args.header:
        parser.error("--header is for csv and tsv")
    args.name = "stdin" if args.input_file == STDIN else args.input_file  # in messages
    return args


# ------------------------------------------------------------------------------------------------------------- formats
def guess_format(sample: Sequence[str]) -> str:
    """Return the format of a file by its first lines."""
    for name in ("jsonl", "csv", "quoted_tsv"):
        if formats.FORMATS[name](sample, (2, 3)):
            return name
    return "tsv"


def read_cells(lines: Lines, format: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of csv, quoted_tsv or tsv that are not blank, each with the number of its first line.

    Raises:
        InputError: the quotes of a row are not those of CSV.
    """
    if format == "tsv":
        rows = ((number, line.split("\t")) for number, line in lines)
    else:
        rows = read_quoted_cells(lines, DELIMITERS[format], where)
    for number, cells in rows:
        if any(cell.strip() for cell in cells):
            yield number, cells


def read_quoted_cells(lines: Lines, delimiter: str, where: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(CELL_CHARACTERS)
    reader = csv.reader((f"{line}\n" for _, line in lines), delimiter=delimiter, strict=True)
    while True:
        first_line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{where}:{first_line}: the quotes of this row are not those of CSV: {error}; fix them, "
                             "or read quotes as text with --format tsv") from None
        if cells is None:
            return
        yield first_line, cells


def find_columns(fields: Sequence[str], names: Sequence[str], name: str) -> list[int]:
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
            raise InputError(f"--fields {field}: no such column in {name}; there are {', '.join(names)}")
    return places


def read_columns(args: argparse.Namespace, lines: Lines) -> tuple[list[str], Iterator[Row]]:
    """Return the names of the columns to write of csv or tsv, and an iterator over their rows."""
    records = read_cells(lines, args.format, f"--input_file {args.name}")
    sample = list(itertools.islice(records, formats.SAMPLE))
    first = [cell.strip() for cell in sample[0][1]]
    if args.header:
        header = args.header == "yes"
    else:
        by_name = any(not field.isdecimal() for field in args.fields or [])
        header = by_name or formats.is_header([cells for _, cells in sample])
        console.log(f"{args.name}: the first row is {'a' if header else 'no'} header, --header "
                    f"{'no' if header else 'yes'} if that is wrong: {console.some(first)[:60]}")
    names = first if header else [str(number) for number in range(1, len(first) + 1)]
    places = find_columns(args.fields or names, names, args.name)

    def select(record: tuple[int, list[str]]) -> Row:
        number, cells = record
        if len(cells) != len(names):
            return Row(number, cells, f"columns: {len(cells)} instead of {len(names)}")
        return clean(number, [cells[place] for place in places])

    rows = map(select, itertools.chain(sample[header:], records))
    return [names[place] for place in places], rows


def read_objects(args: argparse.Namespace, lines: Lines) -> tuple[list[str], Iterator[Row]]:
    """Return the keys to write of JSON objects, and an iterator over their rows, several for one with lists."""
    lines = ((number, line) for number, line in lines if line.strip())
    sample = list(itertools.islice(lines, formats.SAMPLE))
    table = formats.find_json_objects([line.strip() for _, line in sample], (1,))
    keys = args.fields or (table.names if table else [])

    def rows() -> Iterator[Row]:
        for number, line in itertools.chain(sample, lines):
            try:
                found = json.loads(line)
                members = [members_of(found, key) for key in keys]
            except (ValueError, RecursionError) as error:
                yield Row(number, [line], str(error))
                continue
            for fields in itertools.product(*members):
                yield clean(number, fields)

    return list(keys), rows()


def members_of(found: object, key: str) -> list[str]:
    """Return the text of a JSON object's key, or of each member of its list.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(found, dict):
        raise ValueError("JSON, but no object")
    value = found.get(key)
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


SELECTIONS: dict[str | None, Callable[[Iterable[Sequence[str]]], Iterable[Sequence[str]]]] = {
    None: lambda rows: rows, "positives": keep_positives, "negatives": combine_negatives}


def main() -> None:
    args = parse_args()
    lines = iter(read_lines(args.input_file, "--input_file", args.name))
    ahead = list(itertools.islice(lines, formats.SAMPLE))
    sample = [line.strip(" \r\n") for _, line in ahead if line.strip()]
    if not sample:
        raise InputError(f"--input_file {args.name}: the file is empty")
    if args.format is None:
        args.format = guess_format(sample)
        console.log(f"{args.name}: read as {args.format}")
    read = read_objects if args.format == "jsonl" else read_columns
    names, rows = read(args, itertools.chain(ahead, lines))
    if args.labels and len(names) != 3:
        raise InputError(f"--labels needs text, text and label, not {', '.join(names)}; choose three columns with "
                         "--fields")
    report = RowReport("--input_file", args.name, keep_malformed=False)

    def good_rows() -> Iterator[list[str]]:
        for row in rows:
            if args.labels and row.problem is None and row.fields[2] not in LABELS:
                row = row._replace(problem=f"label {row.fields[2]!r} is neither 0 nor 1")
            report.add(row)
            if row.problem is None:
                yield row.fields

    written = 0
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    with contextlib.nullcontext(sys.stdout) if args.output_file == STDIN else new_file(args.output_file) as file:
        for fields in SELECTIONS[args.labels](good_rows()):
            file.write("\t".join(fields) + "\n")
            written += 1
        report.finish()
        if not written:
            raise InputError(f"--input_file {args.name}: --labels {args.labels} leaves no pair")
    target = "stdout" if args.output_file == STDIN else args.output_file
    columns = "" if args.labels else f" of {', '.join(names)}"
    console.log(f"wrote {console.count(written, 'line')}{columns} to {target}")


if __name__ == "__main__":
    console.run(main)
