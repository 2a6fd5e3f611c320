"""Read the rows of text files in columns: one after the other, or any row by its number."""

import itertools
import math
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from simcse.console import InputError, part, settings, warn, warn_data
from simcse.files import STDIN, show_reading
from simcse.text import formats
from simcse.text.lines import BOM, REPLACEMENT, read_lines, refuse_binary, scan_lines

import numpy as np

BLANK = "blank"  # the problem of a line without text


class Row(NamedTuple):
    """A line of a file in columns.

    Attributes:
        line_number: from 1.
        fields: the texts between the tabs, without the white space around them.
        problem: why the row is malformed, such as "blank" or "columns: 3 instead of 2"; None: it is well-formed.
    """

    line_number: int
    fields: list[str]
    problem: str | None = None


Check = Callable[[list[str]], str | None]  # returns what is wrong with the fields of a row; None: nothing


def parse_row(line_number: int, line: str, columns: int, check: Check | None = None) -> Row:
    """Return the row of a line, with its problem if it has one."""
    fields = [field.strip() for field in line.split("\t")]
    if not any(fields):
        problem = BLANK
    elif len(fields) != columns:
        problem = f"columns: {len(fields)} instead of {columns}"
    elif not all(fields):
        problem = "an empty field"
    elif check is not None:
        problem = check(fields)
    else:
        problem = None
    return Row(line_number, fields, problem)


class RowReport:
    """Count the rows of a file, and warn of those that are malformed.

    Args:
        flag: the flag that named the file, for messages.
        name: the file's name in messages; "stdin" for stdin.
        keep_malformed: whether malformed rows are kept and get no result, or are skipped.
    """

    SHOWN = 3  # malformed rows that messages name

    def __init__(self, flag: str, name: str, *, keep_malformed: bool) -> None:
        self.flag = flag
        self.name = name
        self.keep_malformed = keep_malformed
        self.total = 0
        self.blank = 0
        self.malformed = 0  # blank ones are not counted here
        self.problems: list[str] = []  # of the first blank or malformed rows, as "file:line (problem)"
        self.lossy = 0  # rows with U+FFFD
        self.lossy_places: list[str] = []  # the first of them, as "file:line"

    def add(self, row: Row) -> None:
        """Count a row. On stdin, where somebody waits for an answer, warn of the first malformed ones at once.

        Raises:
            InputError: the row has a problem, and --strict_data is given.
        """
        self.total += 1
        if any(REPLACEMENT in field for field in row.fields):
            self.lossy += 1
            if len(self.lossy_places) < self.SHOWN:
                self.lossy_places.append(f"{self.name}:{row.line_number}")
        if row.problem is not None:
            self._add_malformed(row)

    def _add_malformed(self, row: Row) -> None:
        place = f"{self.name}:{row.line_number}"
        if settings.strict_data:
            raise InputError(f"{self.flag} {place}: {row.problem} (--strict_data)")
        if row.problem == BLANK:
            self.blank += 1
        else:
            self.malformed += 1
        if len(self.problems) < self.SHOWN:
            self.problems.append(f"{place} ({row.problem})")
            if self.name == "stdin":
                outcome = "gets no result (NaN, empty or null)" if self.keep_malformed else "is skipped"
                warn(f"{self.flag} {place}: {row.problem}; the line {outcome}")

    def finish(self) -> None:
        """Warn of malformed rows and of lost characters.

        Raises:
            InputError: no row is well-formed, or more rows are malformed than well-formed. The second is no error on
                stdin if malformed rows are kept: each line has been answered by then.
        """
        where = f"{self.flag} {self.name}"
        without_result = self.blank + self.malformed
        well_formed = self.total - without_result
        kind = "blank or malformed" if self.keep_malformed else "malformed"
        report = f"{part(without_result, self.total, 'line', 'are')} {kind}: {', '.join(self.problems)}"
        is_answered = self.keep_malformed and self.name == "stdin"
        if self.malformed == 0 and well_formed == 0:
            raise InputError(f"{where}: the file is empty")
        if well_formed == 0 or (self.malformed > well_formed and not is_answered):
            raise InputError(f"{where}: {report}")
        if self.problems:
            outcome = "no result (NaN, empty or null)" if self.keep_malformed else "skipped"
            warn(f"{where}: {report}; {outcome}; fix or remove {'it' if without_result == 1 else 'them'}")
        if self.lossy:
            warn_data(f"{where}: {part(self.lossy, self.total, 'line', 'have')} U+FFFD, which stands for bytes that an "
                      f"earlier conversion lost; convert the original again: {', '.join(self.lossy_places)}")


def read_rows(path: str, columns: int, flag: str, check: Check | None = None, *, keep_malformed: bool = False,
              name: str | None = None, check_format: bool = True) -> Iterator[Row]:
    """Yield the rows of a tab-separated UTF-8 file, or of stdin, as they are read.

    Lines end in \\n, \\r\\n or \\r. White space around a field is removed, inside it stays. Blank lines are skipped.
    Malformed rows (another number of columns, an empty field, a problem that `check` finds) are skipped too; a warning
    counts them and names the first three.

    Args:
        path: the file; STDIN for stdin.
        columns: how many fields a row has.
        flag: the flag that named the file, for messages.
        check: returns what is wrong with the fields of a row; None: nothing.
        keep_malformed: yield blank and malformed rows as well, with their `problem`.
        name: the file's name in messages, if it is not `path`.
        check_format: refuse a file in another format, unless --plain_text is set. False: this has been done already.

    Raises:
        InputError: the file is not UTF-8, or in another format; a row is malformed, with --strict_data; or as
            `RowReport.finish`.
    """
    if name is None:
        name = "stdin" if path == STDIN else path
    lines = read_lines(path, flag, name)
    if check_format:
        lines = formats.check_lines(lines, name, flag, (columns,))
    report = RowReport(flag, name, keep_malformed=keep_malformed)
    for line_number, line in lines:
        row = parse_row(line_number, line, columns, check)
        if row.problem == BLANK and not keep_malformed:
            continue
        report.add(row)
        if row.problem is None or keep_malformed:
            yield row
    report.finish()


class TextFile(Sequence):
    """A sequence of the rows of a file, each of which is read from the file when it is used.

    Memory holds only where the lines are, 8 to 12 bytes each. Rows, warnings and errors are those of `read_rows`. With
    one column a row is a text, with several it is a list of texts.

    Args:
        path: the file. A pipe is copied to a temporary file first.
        flag: the flag that named the file, for messages.
        columns: how many fields a row has; or several numbers, of which `choose_columns` chooses.

    Attributes:
        name: the file's name in messages.
        path: the file that is read; for a pipe its copy.
        columns: how many fields a row has.
    """

    BLOCK_ROWS = 1024  # rows that an iterator reads together

    def __init__(self, path: str, flag: str, columns: int | tuple[int, ...] = 1) -> None:
        self.name = path
        self._file = _open_seekable(path)
        self.path = self._file.name
        refuse_binary(os.pread(self._file.fileno(), formats.HEAD_BYTES, 0), flag, self.name)
        is_fixed = isinstance(columns, int)  # otherwise `choose_columns` checks the format
        self.columns = columns if is_fixed else choose_columns(self.path, flag, columns, self.name)
        with show_reading(self.path) as advance:
            scan = scan_lines(self._file, advance)
        self._offsets = scan.offsets
        self._row_lines: np.ndarray | None = None  # int32 [rows], the line, from 0, of each row; None: all are rows
        if self.columns == 1 and scan.is_plain:
            self._skip_blank_lines(scan.maybe_blank.tolist(), flag)
            if is_fixed:
                formats.check_format(self[: formats.SAMPLE_LINES], self.name, flag, (1,))
        else:
            rows = read_rows(self.path, self.columns, flag, name=self.name, check_format=is_fixed)
            self._row_lines = np.fromiter((row.line_number - 1 for row in rows), "int32")

    def _skip_blank_lines(self, maybe_blank: Sequence[int], flag: str) -> None:
        """Make rows of all lines that are not blank, of a file without malformed lines.

        Args:
            maybe_blank: the lines, from 0, that begin with white space.
            flag: the flag that named the file, for messages.

        Raises:
            InputError: all lines are blank.
        """
        blank = [line for line in maybe_blank if not self[line]]
        if blank:
            self._row_lines = np.delete(np.arange(len(self), dtype="int32"), blank)
        if not len(self):
            raise InputError(f"{flag} {self.name}: the file is empty")

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._row_lines is None else len(self._row_lines)

    def __getitem__(self, row):
        """Return a row, or the list of rows of a slice."""
        if isinstance(row, slice):
            return self.read(range(len(self))[row])
        return self.read([range(len(self))[row]])[0]

    def __iter__(self):
        """Yield all rows, which are read in blocks."""
        for start in range(0, len(self), self.BLOCK_ROWS):
            yield from self[start : start + self.BLOCK_ROWS]

    def read(self, rows: Sequence[int]) -> list:
        """Return some rows, given by their numbers from 0, in this order."""
        return [self._parse(line) for line in self._read_lines(rows)]

    def line_number(self, row: int) -> int:
        """Return the number, from 1, of a row's line in the file."""
        line = row if self._row_lines is None else self._row_lines[row]
        return int(line) + 1

    def place(self, row: int) -> str:
        """Return where a row stands, as file:line."""
        return f"{self.name}:{self.line_number(row)}"

    def blank_or_skipped(self) -> np.ndarray:
        """Return the numbers, from 1, of the lines that are no rows, ascending, int64."""
        if self._row_lines is None:
            return np.empty(0, "int64")
        return np.setdiff1d(np.arange(1, len(self._offsets)), self._row_lines + 1, assume_unique=True)

    def sample_rows(self, count: int) -> list[tuple[str, Any]]:
        """Return `count` rows at even distances in the file, in its order, each as (place, row)."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return [(self.place(row), self[row]) for row in rows]

    def sample_texts(self, count: int) -> list[str]:
        """Return the different texts of `count` rows at even distances in the file, in its order."""
        texts: list[str] = []
        for _, row in self.sample_rows(count):
            if self.columns == 1:
                texts.append(row)
            else:
                texts += row
        return distinct(texts)

    def _read_lines(self, rows: Sequence[int]) -> list[bytes]:
        """Return the bytes of the lines of some rows.

        Rows close together, such as those of a block, are read at once; rows far apart are read one by one.
        """
        lines = np.asarray(rows, "int64") if self._row_lines is None else self._row_lines[rows]
        if not len(lines):
            return []
        begins = self._offsets[lines]
        ends = self._offsets[lines + 1]
        first = int(begins.min())
        size = int(ends.max()) - first  # bytes from the first line to the last
        wanted = int((ends - begins).sum())
        descriptor = self._file.fileno()
        spans = list(zip(begins.tolist(), ends.tolist()))
        if size <= min(2 * wanted, 1 << 30):
            block = os.pread(descriptor, size, first)
            return [block[begin - first : end - first] for begin, end in spans]
        return [os.pread(descriptor, end - begin, begin) for begin, end in spans]

    def _parse(self, line: bytes) -> str | list[str]:
        """Return the row of a line."""
        text = line.decode("utf-8").replace(BOM, "").strip()
        if self.columns == 1:
            return text
        return [field.strip() for field in text.split("\t")]


def _open_seekable(path: str) -> BinaryIO:
    """Open a file; a pipe, in which no offset can be read, is copied to a temporary file first."""
    if os.path.isfile(path):
        return open(path, "rb")
    copy = tempfile.NamedTemporaryFile()  # noqa: SIM115  removed when it is closed
    with open(path, "rb") as pipe:
        shutil.copyfileobj(pipe, copy)
    copy.seek(0)
    return copy


class Corpus(TextFile):
    """A sequence of documents, or of queries. A line is a text, or an id, a tab and a text; a row is the text.

    Ids are unique: a line with the id of an earlier line is skipped, and a warning counts such lines.

    Args:
        path: the file. A pipe is copied to a temporary file first.
        flag: the flag that named the file, for messages.
        columns: 1 without ids, 2 with ids; None: as most of the first lines have.

    Raises:
        InputError: as `read_rows`; or lines have the id of an earlier line, with --strict_data any, without it more
            than half of all lines.
    """

    def __init__(self, path: str, flag: str, columns: int | None = None) -> None:
        super().__init__(path, flag, columns or formats.CORPUS_COLUMNS)
        if self.has_ids:
            self._skip_duplicate_ids(flag)

    def _skip_duplicate_ids(self, flag: str) -> None:
        """Leave out the rows whose id an earlier row has."""
        # Python's hash differs between processes, which does not matter here, and is ten times as fast as a key.
        hashes = np.fromiter(map(hash, self.all_ids()), "int64", len(self))
        first_rows = np.unique(hashes, return_index=True)[1]
        duplicates = np.delete(np.arange(len(hashes)), first_rows)
        if not len(duplicates):
            return
        places = ", ".join(self.place(row) for row in duplicates[:3])
        message = (f"{flag} {self.name}: {part(len(duplicates), len(hashes), 'id', 'stand')} on an earlier line too: "
                   f"{places}")
        if settings.strict_data:
            raise InputError(f"{message} (--strict_data)")
        if len(duplicates) > len(hashes) / 2:
            raise InputError(f"{message}; expected {formats.EXPECTED[formats.CORPUS_COLUMNS]}")
        warn(f"{message}; skipped")
        self._row_lines = np.delete(self._row_lines, duplicates)

    @property
    def has_ids(self) -> bool:
        """Whether each line has an id before the text."""
        return self.columns == 2

    def ids(self, rows: Sequence[int]) -> list[str | None]:
        """Return the ids of some rows, given by their numbers; None for each if the corpus has no ids."""
        if not self.has_ids:
            return [None] * len(rows)
        return [super(Corpus, self)._parse(line)[0] for line in self._read_lines(rows)]

    def all_ids(self) -> Iterator[str | None]:
        """Yield the ids of all rows, which are read in blocks."""
        for start in range(0, len(self), self.BLOCK_ROWS):
            yield from self.ids(range(start, min(start + self.BLOCK_ROWS, len(self))))

    def _parse(self, line: bytes) -> str:
        """Return the text of a line."""
        row = super()._parse(line)
        return row[1] if self.has_ids else row


def read_targets(path: str, flag: str, corpus_file: str | None, *, keep_malformed: bool = False) -> Iterator[Row]:
    """Yield the rows of query and target of a file, as `read_rows` does.

    Args:
        path: the file; STDIN for stdin.
        flag: the flag that named the file, for messages.
        corpus_file: if targets are ids, the corpus that has them: a target becomes the text of its document. A row with
            an unknown id is malformed; if it is kept, its target is "". None: targets are texts.
        keep_malformed: yield blank and malformed rows as well, with their `problem`.
    """
    if not corpus_file:
        yield from read_rows(path, 2, flag, keep_malformed=keep_malformed)
        return
    corpus = Corpus(corpus_file, "--corpus_file", 2)
    row_of_id = {id: row for row, id in enumerate(corpus.all_ids())}

    def find_unknown_id(fields: list[str]) -> str | None:
        target = fields[1]
        return None if target in row_of_id else f"no document has the id {target}"

    for row in read_rows(path, 2, flag, find_unknown_id, keep_malformed=keep_malformed):
        if len(row.fields) == 2 and all(row.fields):
            query, target = row.fields
            text = corpus[row_of_id[target]] if target in row_of_id else ""
            row = row._replace(fields=[query, text])
        yield row


def read_text_pairs(path: str, flag: str) -> list[tuple[str, str]]:
    """Return the query and the title of each row of a file."""
    return [(row.fields[0], row.fields[1]) for row in read_rows(path, 2, flag)]


def find_label_problem(fields: list[str]) -> str | None:
    """Return what is wrong with the label of a row of text, text and label; None: it is a finite number."""
    label = fields[2]
    try:
        number = float(label)
    except ValueError:
        return f"label {label!r} is not a number"
    return None if math.isfinite(number) else f"label {label!r} is not a finite number"


def choose_columns(path: str, flag: str, choices: tuple[int, ...], name: str | None = None) -> int:
    """Return which of the allowed numbers of columns is the most frequent in the first 1,000 lines of a file.

    If two are equally frequent, the one of the earlier line is returned.

    Args:
        path: the file.
        flag: the flag that named it, for messages.
        choices: the numbers of columns that are allowed.
        name: the file's name in messages, if it is not `path`.

    Raises:
        InputError: no line has an allowed number of columns, or the file is in another format.
    """
    name = name or path
    lines = formats.check_lines(read_lines(path, flag, name), name, flag, choices)
    line_counts = Counter(line.count("\t") + 1 for _, line in itertools.islice(lines, 1000) if line.strip())
    if not line_counts:
        raise InputError(f"{flag} {name}: the file is empty")
    allowed = [columns for columns in line_counts if columns in choices]
    if not allowed:
        expected = " or ".join(map(str, choices))
        raise InputError(f"{flag} {name}: no line has {expected} tab-separated columns")
    return max(allowed, key=line_counts.get)


def normalize(text: str) -> str:
    """Return a key for near duplicates: a text in Unicode's NFKC, without spaces and invisible characters."""
    text = unicodedata.normalize("NFKC", text).replace(" ", "")
    if text.isprintable():
        return text
    return "".join(character for character in text if character.isprintable())


def distinct(texts: Iterable[str]) -> list[str]:
    """Return the different texts, in the order of their first appearance."""
    return list(dict.fromkeys(texts))
