"""Text files of other kinds, as the scripts read them: UTF-8, a row a line, columns between tabs, no header.

    python scripts/to_tsv.py --input_file train.csv --output_file recall/train.csv
    python scripts/to_tsv.py --input_file excel.csv --encoding gbk --fields content --output_file recall/corpus.csv
    python scripts/to_tsv.py --input_file train.jsonl --fields query pos neg --output_file recall/train.csv
    python scripts/to_tsv.py --input_file labelled.tsv --labels positives --output_file recall/train.csv

Reads CSV and TSV, with quotes and with line breaks in cells, and JSON lines. Every run of white space in a text becomes
a blank. What is skipped, left out or taken for a header is said on stderr. It needs no paddle.
"""

import argparse
import codecs
import contextlib
import csv
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from simcse import console, flags
from simcse.console import InputError
from simcse.files import STDIN, new_file
from simcse.text.encodings import BLOCK, encodings, known_bytes, wide
from simcse.text.formats import HEADER, LABELS, NUMBER, NUMBERING, SAMPLE, leaves, named, names_columns

CELL_LINES = 1000  # of a cell in quotes, at most: a quote that nobody closes must not take the file with it
DELIMITERS = {"csv": ",", "tsv": "\t"}
NAME = re.compile(rf"[A-Za-z_][\w.-]{{0,24}}|{HEADER.pattern}", re.I)  # of a column, where texts are Chinese
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character of JSON, or a byte that is none of the encoding
Lines = Iterator[tuple[int, str]]  # numbers, from 1, and lines


class Malformed(Exception):
    """Why a row is skipped."""


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input_file", type=lambda path: path if path == STDIN else flags.readable_file(path),
                        required=True, help="what to convert; -: stdin")
    parser.add_argument("--output_file", type=flags.nonempty_text, default=STDIN,
                        help="what to write, columns between tabs; -: stdout")
    parser.add_argument("--format", choices=(*DELIMITERS, "jsonl"), default=None,
                        help="csv: commas; tsv: tabs; jsonl: a JSON object a line; None: by the first lines")
    parser.add_argument("--encoding", type=encoding, default="utf-8", help="of the input: gbk, big5, utf-16 and others")
    parser.add_argument("--header", choices=("yes", "no"), default=None,
                        help="whether the first row of csv or tsv names the columns; None: by the first rows")
    parser.add_argument("--fields", type=flags.nonempty_text, nargs="+", default=None,
                        help="columns to take, in this order: names of the header, numbers from 1, or keys of the JSON "
                        "objects, a.b for b in a; a list gives a line for each member. None: all but numbers of rows")
    parser.add_argument("--labels", choices=("positives", "negatives"), default=None,
                        help="of text, text, 1 or 0. positives: the pairs of label 1, without it; negatives: text, a "
                        "text of label 1, a text of label 0, a line for each two of them. None: rows stay as they are")
    flags.add_strict_argument(parser)
    args = parser.parse_args()
    if os.path.isdir(args.output_file):
        parser.error(f"argument --output_file: {args.output_file}: is a directory")
    if args.format == "jsonl" and args.header:
        parser.error("--header is for csv and tsv")
    args.name = "stdin" if args.input_file == STDIN else args.input_file  # in messages
    return args


def encoding(name: str) -> str:
    """A codec's name; GB18030 for GBK, which is part of it, and UTF-8 with or without BOM."""
    try:
        known = codecs.lookup(name).name
        "".encode(known)  # some codecs are not of texts
    except LookupError:
        raise argparse.ArgumentTypeError(f"{name}: no such encoding") from None
    return {"gbk": "gb18030", "gb2312": "gb18030", "utf-8": "utf-8-sig"}.get(known, known)


# ------------------------------------------------------------------------------------------------------- reading
def read_lines(args: argparse.Namespace) -> Lines:
    """The lines, split at \\n, \\r\\n and \\r alone; a byte that is none of the encoding is a surrogate in them."""
    stdin = args.input_file == STDIN
    with (open(0 if stdin else args.input_file, encoding=args.encoding, errors="surrogateescape", newline="",
               closefd=not stdin) as file,
          console.progress("reading", None, "lines") as advance,
          console.reported(f"--input_file {args.name}", UnicodeError, remedy=" (--encoding)")):  # of UTF-16, say
        for number, line in enumerate(file, 1):
            yield number, line
            advance()


def guess_format(args: argparse.Namespace, sample: Sequence[str]) -> str:
    """jsonl, tsv or csv, by a file's first lines; texts that do not have the same number of commas are no csv.

    Raises:
        InputError: none of these, but what its message says.
    """
    start, convert = "".join(sample).encode("utf-8", "surrogateescape"), "--encoding {}".format
    kind = known_bytes(start[:BLOCK], convert)
    if not kind and b"\0" in start:
        kind = wide(start[:BLOCK], convert) or "no text"
    elif re.match(rb"\s*\[\s*\{", start):
        kind = "a JSON array; jq -c '.[]' FILE makes lines of it"
    if kind:
        raise InputError(f"--input_file {args.name}: {named(kind, args.name)}")
    if start.lstrip().startswith(b"{"):
        return "jsonl"
    for kind in ("tsv", "csv"):
        rows = split_rows(enumerate(sample, 1), DELIMITERS[kind], quoted(sample, kind))
        counts = Counter(len(row) for _, row in rows if isinstance(row, list))
        if any(columns > 1 and rows >= 0.8 * counts.total() for columns, rows in counts.items()):
            return kind
    return "csv" if start.startswith(b'"') else "tsv"  # of one column


def quoted(sample: Sequence[str], kind: str) -> bool:
    """Whether quotes stand around fields. In tsv they are the texts' own, unless all fields of the first row are in
    quotes, or a field has quotes within that are doubled."""
    text = "".join(sample).lstrip()
    return kind == "csv" or bool(
        re.match(r'"[^"]*"(\t"[^"]*")*\s*$', text, re.M) or re.search(r'(^|\t)"[^"]+""', text, re.M))


def split_rows(lines: Lines, delimiter: str, quotes: bool) -> Iterator[tuple[int, list[str] | Malformed]]:
    """The rows of csv or tsv but blank ones, each with the number of its first line; a cell in quotes may have line
    breaks. A line whose quotes are none that csv could have is Malformed, and reading goes on with the next."""
    csv.field_size_limit(1 << 28)
    lines, again = iter(lines), []
    while first := again.pop() if again else next(lines, None):
        row, read = parse([first[1]], delimiter, quotes), [first]
        while row is None and len(read) < CELL_LINES and (more := again.pop() if again else next(lines, None)):
            read.append(more)
            if '"' in more[1]:
                row = parse([line for _, line in read], delimiter, quotes)
        if not isinstance(row, list):
            again.extend(reversed(read[1:]))
            row = row or Malformed("a quote that is not closed")
        if isinstance(row, Malformed) or any(map(str.strip, row)):
            yield first[0], row


def parse(lines: list[str], delimiter: str, quotes: bool) -> list[str] | Malformed | None:
    """The fields of a row; None: a cell in quotes goes on."""
    if not quotes:
        return lines[0].rstrip("\r\n").split(delimiter)
    try:
        return next(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return None if str(error) == "unexpected end of data" else Malformed(f"quotes within a field: {error}")


def parse_objects(lines: Lines) -> Iterator[tuple[int, dict | Malformed]]:
    """The objects of JSON lines; blank lines are left out."""
    for number, line in lines:
        if line.strip():
            try:
                found = json.loads(line)
                yield number, found if isinstance(found, dict) else Malformed("JSON, but no object")
            except (ValueError, RecursionError) as error:
                yield number, Malformed(f"no JSON: {error}")


# --------------------------------------------------------------------------------------------------- what to take
class Table:
    """Iterates over the rows of a file, cleaned; `report` tells of those that are skipped.

    Args:
        records: the number of a line, and its fields, its JSON object, or a Malformed.
        names: of the columns that are taken.
        rows_of: gives the rows of a record, as many fields as `names`; raises Malformed.
    """

    def __init__(self, args: argparse.Namespace, records: Iterable[tuple[int, Any]], names: Sequence[str],
                 rows_of: Callable[[Any], Iterable[Sequence[str]]]) -> None:
        self.args, self.records, self.names, self.rows_of = args, records, names, rows_of
        self.good = self.skipped = self.changed = self.in_quotes = 0
        self.bad: list[str] = []  # the first three
        self.foreign: list[bytes] = []  # rows in another encoding
        self.labels: Counter[int | None] = Counter()  # of the last column, where there are three

    def __iter__(self) -> Iterator[list[str]]:
        for number, record in self.records:
            try:
                if isinstance(record, Malformed):
                    raise record
                yield from [self._clean(row) for row in self.rows_of(record)]
                self.good += 1
            except Malformed as found:
                if self.args.strict_data:
                    raise InputError(f"--input_file {self.args.name}:{number}: {found} (--strict_data)") from None
                self.skipped += 1
                if self.skipped <= 3:
                    self.bad.append(f"{self.args.name}:{number} ({found})")

    def _clean(self, row: Sequence[str]) -> list[str]:
        clean = [" ".join(field.split()) for field in row]
        if not all(clean):
            raise Malformed("an empty field")
        if SURROGATE.search("".join(clean)):
            name = self.args.encoding.removesuffix("-sig")
            with contextlib.suppress(UnicodeError):  # half a character of JSON
                self.foreign.append("\t".join(clean).encode(name, "surrogateescape"))
            raise Malformed(f"not {name}")
        self.changed += any(field.strip() != text for field, text in zip(row, clean))
        self.in_quotes += any(len(text) > 1 and text[0] == text[-1] == '"' for text in clean)
        self.labels[LABELS.get(clean[2]) if len(clean) == 3 else None] += 1
        return clean

    def report(self, written: int) -> None:
        """Say what was skipped, of the first three rows why, and how many lines were written.

        Raises:
            InputError: no row is good, or more than half are not, or --labels left nothing.
        """
        name, kept = self.args.name, self.args.labels
        said = f"{self.skipped} of {self.good + self.skipped} rows are malformed: {', '.join(self.bad)}"
        if self.skipped > self.good or not self.good:
            fits = [f"{codec} ({sure:.0%})" for codec, sure in encodings(self.foreign[:SAMPLE]).items()]
            said += f"; by charset-normalizer --encoding may be {' or '.join(fits[:3])}" * bool(fits)
            raise InputError(f"--input_file {name}: {said if self.skipped else 'no row below the header'}")
        if self.skipped:
            console.warn(f"{name}: skipped; {said}")
        for count, what in ((self.changed, "line breaks or runs of white space became a blank"),
                            (self.in_quotes, "a text has quotes around it, which stay")):
            if count:
                console.log(f"{name}: in {console.count(count, 'row')} {what}")
        if kept:
            console.log(f"label 1: {self.labels[1]}, label 0: {self.labels[0]}")
            if self.labels[None]:
                console.warn(f"{name}: skipped; {console.count(self.labels[None], 'label')} neither 0 nor 1")
            if not written:
                raise InputError(f"--input_file {name}: no pair is left by --labels {kept}")
        elif not self.labels[None]:
            console.warn(f"{name}: the third column is 0 or 1 throughout: right for train.py --test_set_file; to "
                         "train on such pairs, --labels positives or --labels negatives")
        columns = {"positives": self.names[:2], "negatives": ["text", "positive", "negative"]}.get(kept, self.names)
        console.log(f"wrote {console.count(written, 'line')} of {', '.join(columns)} to "
                    + ("stdout" if self.args.output_file == STDIN else self.args.output_file))


def is_header(first: Sequence[str], rest: Sequence[Sequence[str]]) -> bool:
    """Whether the first row names the columns: by words that columns are called by, by others where no other row is of
    such, or by one that is no number above numbers alone."""
    numbers = [all(NUMBER.fullmatch(field.strip()) for field in column) for column in zip(*rest)]
    return bool(rest) and len(set(first)) == len(first) and (
        names_columns(first) or (names_columns(first, NAME) and not any(names_columns(row, NAME) for row in rest))
        or any(number and not NUMBER.fullmatch(name) for name, number in zip(first, numbers)))


def unless_numbering(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The names of columns, without those that number the rows, which is said."""
    numbering = [name for name in names if name.rsplit(".", 1)[-1].lower() in NUMBERING]
    if numbering:
        console.log(f"{args.name}: left out: {', '.join(map(repr, numbering))}; --fields takes them")
    return [name for name in names if name not in numbering]


def table_of_rows(args: argparse.Namespace, lines: Lines, sample: Sequence[str]) -> Table:
    """The table of a csv or tsv file; InputError where --fields names a column that is not there."""
    quotes = quoted(sample, args.format)
    records = split_rows(lines, DELIMITERS[args.format], quotes)
    ahead = list(itertools.islice(records, SAMPLE))
    good = [row for _, row in ahead if isinstance(row, list)] or [[]]
    first, width = [field.strip() for field in good[0]], Counter(map(len, good)).most_common(1)[0][0]
    header = args.header == "yes"
    if args.header is None:
        header = any(not field.isdecimal() for field in args.fields or []) or is_header(
            first, [row for row in good[1:] if len(row) == len(first)])
        shown = console.some(first)[:60].encode(errors="replace").decode()
        console.log(f"{args.name}: the first row is {'a' if header else 'no'} header, --header "
                    f"{'no' if header else 'yes'} where that is wrong: {shown}")
    names = first if header else [str(number) for number in range(1, width + 1)]
    if header:
        width, ahead = len(first), [each for each in ahead if each[1] is not good[0]]
    if quotes and args.format == "tsv":
        console.log(f"{args.name}: the quotes around fields are taken away")
    columns = []
    for field in args.fields or (unless_numbering(args, names) if header else names):
        columns.append(names.index(field) if field in names else int(field) - 1 if field.isdecimal() else -1)
        if not 0 <= columns[-1] < width:
            raise InputError(f"--fields {field}: no such column in {args.name}; there are {', '.join(names)}"
                             + ("" if header else ", without a header"))

    def rows_of(row: list[str]) -> list[list[str]]:
        if len(row) != width:
            raise Malformed(f"columns: {len(row)} instead of {width}")
        return [[row[column] for column in columns]]

    return Table(args, itertools.chain(ahead, records), [names[column] for column in columns], rows_of)


def table_of_objects(args: argparse.Namespace, lines: Lines) -> Table:
    """The table of JSON lines."""
    records = parse_objects(lines)
    ahead = list(itertools.islice(records, SAMPLE))
    filled: dict[str, bool] = {}  # by field, whether there is ever anything
    for path, value in itertools.chain(*(leaves(found) for _, found in ahead if isinstance(found, dict))):
        filled[path] = filled.get(path, False) or value not in ("", None)
    fields = args.fields or unless_numbering(args, [path for path in filled if filled[path]])
    if not args.fields and not all(filled.values()):
        console.log(f"{args.name}: left out, since empty in the first {console.count(len(ahead), 'line')}: "
                    + ", ".join(path for path in filled if not filled[path]))
    paths = [field.split(".") for field in fields]
    keys = list(dict.fromkeys(path[0] for path in paths))

    def rows_of(found: dict) -> Iterator[list[str]]:
        if missing := [key for key in keys if found.get(key, []) == []]:
            raise Malformed(f"no {missing[0]}")
        members = (found[key] if isinstance(found[key], list) else [found[key]] for key in keys)
        for row in itertools.product(*members):
            yield [text_of(dict(zip(keys, row)), path) for path in paths]

    return Table(args, itertools.chain(ahead, records), fields, rows_of)


def text_of(value: Any, path: Sequence[str]) -> str:
    """What stands in a JSON object at the end of a path."""
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise Malformed(f"no {'.'.join(path)}")
        value = value[key]
    if isinstance(value, (dict, list)):
        raise Malformed(f"{'.'.join(path)} is no text")
    if isinstance(value, bool):
        value = int(value)
    return "" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------- writing
def negatives(rows: Iterable[Sequence[str]]) -> Iterator[list[str]]:
    """Text, its positive and its negative, of rows of text, text and label, a row for each two of them; what is
    labelled both ways is a positive."""
    texts: dict[str, dict[str, int]] = {}
    for query, text, label in rows:
        if (value := LABELS.get(label)) is not None:
            of = texts.setdefault(query, {})
            of[text] = max(value, of.get(text, 0))
    alone = 0
    for query, of in texts.items():
        ones, zeros = ([text for text, value in of.items() if value == label] for label in (1, 0))
        alone += 0 if zeros else len(ones)
        yield from ([query, *each] for each in itertools.product(ones, zeros))
    if alone:
        console.log(f"left out: {console.count(alone, 'pair')} of label 1 whose first text has none of label 0")


def open_table(args: argparse.Namespace) -> Table:
    """The table of the input; InputError where it is none, or has other columns than --fields and --labels need."""
    lines = read_lines(args)
    ahead = list(itertools.islice(lines, SAMPLE))
    sample, lines = [line for _, line in ahead], itertools.chain(ahead, lines)
    if not any(map(str.strip, sample)):
        raise InputError(f"--input_file {args.name}: the file holds no text")
    if args.format is None:
        args.format = guess_format(args, sample)
        console.log(f"{args.name}: read as {args.format}")
    table = table_of_objects(args, lines) if args.format == "jsonl" else table_of_rows(args, lines, sample)
    if args.labels and len(table.names) != 3:
        raise InputError(f"--labels needs text, text and label, not {', '.join(table.names) or 'nothing'}; --fields "
                         "chooses three columns")
    return table


def main() -> None:
    args = parse_args()
    table = open_table(args)
    rows, written = table, 0
    if args.labels == "positives":
        rows = (row[:2] for row in table if LABELS.get(row[2]) == 1)
    elif args.labels:
        rows = negatives(table)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    with contextlib.nullcontext(sys.stdout) if args.output_file == STDIN else new_file(args.output_file) as file:
        for written, row in enumerate(rows, 1):  # noqa: B007  the last of the numbers
            file.write("\t".join(row) + "\n")
        table.report(written)


if __name__ == "__main__":
    console.run(main)
