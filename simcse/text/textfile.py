"""Text files in columns: their rows one after the other, checked and counted; or any row, read when it is asked for."""

import itertools
import math
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from simcse.console import InputError, settings, warn, warn_data
from simcse.files import STDIN, show_reading
from simcse.text import formats
from simcse.text.lines import BOM, REPLACEMENT, read_lines, refuse_binary, scan_lines

import numpy as np

BLANK = "blank"  # the problem of a line without text


class Row(NamedTuple):
    """A line of a file in columns.

    Attributes:
        line_number: from 1.
        fields: what stands between the tabs, without the white space around it.
        problem: why the row is malformed, such as "blank" or "columns: 3 instead of 2"; None: it is not.
    """

    line_number: int
    fields: list[str]
    problem: str | None = None


Check = Callable[[list[str]], str | None]  # returns what is wrong with the fields of a row; None: nothing


def parse_row(line_number: int, line: str, columns: int, check: Check | None = None) -> Row:
    """Split a line at its tabs, and find out what is wrong with it."""
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
    """Count the rows of a file, and report on stderr which ones are malformed.

    Args:
        flag: the flag that named the file, for messages.
        name: the file's name in messages; "stdin" for stdin.
        keep_malformed: malformed rows are kept, and get no result; else they are skipped.
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
        self.lossy: list[str] = []  # rows with U+FFFD, as "file:line"

    def add(self, row: Row) -> None:
        """Count a row. Of stdin, where somebody waits for an answer, warn of the first malformed ones at once.

        Raises:
            InputError: the row has a problem, and --strict_data is given.
        """
        self.total += 1
        for field in row.fields:
            if REPLACEMENT in field:
                self.lossy.append(f"{self.name}:{row.line_number}")
                break
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
                fate = "the line gets no result (NaN, empty or null)" if self.keep_malformed else "the line is skipped"
                warn(f"{self.flag} {place}: {row.problem}; {fate}")

    def finish(self) -> None:
        """Warn of malformed rows and of lost characters.

        Raises:
            InputError: there is no good row, or more than half of the rows are malformed. Rows of stdin that have all
                been answered may be.
        """
        where = f"{self.flag} {self.name}"
        good = self.total - self.blank - self.malformed
        kind = "blank or malformed" if self.keep_malformed else "malformed"
        report = f"{self.blank + self.malformed} of {self.total} lines are {kind}: {', '.join(self.problems)}"
        answered = self.keep_malformed and self.name == "stdin"
        if self.malformed == 0 and good == 0:
            raise InputError(f"{where}: the file is empty")
        if good == 0 or (self.malformed > good and not answered):
            raise InputError(f"{where}: {report}")
        if self.problems:
            fate = "they get no result (NaN, empty or null)" if self.keep_malformed else "they are skipped"
            warn(f"{where}: {report}; {fate}; fix or remove them")
        if self.lossy:
            warn_data(f"{where}: {len(self.lossy)} of {self.total} lines have U+FFFD, which stands for bytes that an "
                      f"earlier conversion lost; convert the original again: {', '.join(self.lossy[: self.SHOWN])}")


def read_rows(path: str, columns: int, flag: str, check: Check | None = None, *, keep_malformed: bool = False,
              name: str | None = None, check_format: bool = True) -> Iterator[Row]:
    """Yield the rows of a tab-separated UTF-8 file, or of stdin, as they are read.

    Lines end in \\n, \\r\\n or \\r. Fields lose the white space around them and keep what is inside. Blank lines are
    skipped. Malformed rows (another number of columns, an empty field, a problem that `check` finds) are skipped too;
    a warning counts them and names the first three.

    Args:
        path: the file; STDIN for stdin.
        columns: how many fields a row has.
        flag: the flag that named the file, for messages.
        check: returns what is wrong with the fields of a row; None: nothing.
        keep_malformed: yield blank and malformed rows as well, with their `problem`.
        name: the file's name in messages, if it is not `path`.
        check_format: refuse files of another format, unless --plain_text. False where that has been done.

    Raises:
        InputError: the file is not UTF-8, or of another format; a row is malformed, with --strict_data; or what
            `RowReport.finish` raises.
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
    """The rows of a file, which are read from it when they are asked for.

    Only the offsets of its lines are in memory, 8 bytes a line. Rows, warnings and errors are those of `read_rows`.
    With one column a row is a text, with several it is a list of texts.

    Args:
        path: the file. A pipe is copied to a temporary file first.
        flag: the flag that named the file, for messages.
        columns: how many fields a row has; or several numbers, of which `count_columns` chooses.

    Attributes:
        name: the file's name in messages.
        path: the file that is read; of a pipe its copy.
        columns: how many fields a row has.
    """

    BLOCK_ROWS = 1024  # that are read together where all are read

    def __init__(self, path: str, flag: str, columns: int | tuple[int, ...] = 1) -> None:
        self.name = path
        self._file = _open_seekable(path)
        self.path = self._file.name
        refuse_binary(os.pread(self._file.fileno(), formats.HEAD_BYTES, 0), flag, self.name)
        check_format = isinstance(columns, int)
        self.columns = columns if check_format else count_columns(self.path, flag, columns, self.name)
        with show_reading(self.path) as advance:
            scan = scan_lines(self._file, advance)
        self._offsets = scan.offsets
        self._row_lines: np.ndarray | None = None  # int32 [rows], the line, from 0, of each row; None: all are rows
        if self.columns == 1 and scan.is_plain:  # no line can be malformed
            blank = [line for line in scan.maybe_blank.tolist() if not self[line]]
            if blank:
                self._row_lines = np.delete(np.arange(len(self), dtype="int32"), blank)
            if not len(self):
                raise InputError(f"{flag} {self.name}: the file is empty")
            if check_format:
                formats.check_format(self[: formats.SAMPLE], self.name, flag, (1,))
        else:
            rows = read_rows(self.path, self.columns, flag, name=self.name, check_format=check_format)
            self._row_lines = np.fromiter((row.line_number - 1 for row in rows), "int32")

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._row_lines is None else len(self._row_lines)

    def __getitem__(self, row):
        """Return a row, or the list of rows of a slice."""
        if isinstance(row, slice):
            return self.take(range(len(self))[row])
        return self.take([range(len(self))[row]])[0]

    def __iter__(self):
        """Yield all rows; blocks of them are read together."""
        for start in range(0, len(self), self.BLOCK_ROWS):
            yield from self[start : start + self.BLOCK_ROWS]

    def take(self, rows: Sequence[int]) -> list:
        """Return some rows, given by their numbers from 0, in this order."""
        return [self._parse(line) for line in self._read(rows)]

    def line_number(self, row: int) -> int:
        """Return the number, from 1, of a row's line in the file."""
        line = row if self._row_lines is None else self._row_lines[row]
        return int(line) + 1

    def place(self, row: int) -> str:
        """Return where a row stands, as file:line."""
        return f"{self.name}:{self.line_number(row)}"

    def spread(self, count: int) -> list[tuple[str, Any]]:
        """Return so many rows from all over the file, in its order, each as (place, row)."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return [(self.place(row), self[row]) for row in rows]

    def sample(self, count: int) -> list[str]:
        """Return the different texts of so many rows from all over the file, in its order."""
        texts: list[str] = []
        for _, row in self.spread(count):
            texts += [row] if isinstance(row, str) else row
        return distinct(texts)

    def _read(self, rows: Sequence[int]) -> list[bytes]:
        """Return the bytes of the lines of some rows.

        Rows that stand close together, such as those of a block, are read at once; rows that are far apart one by one.
        """
        lines = np.asarray(rows, "int64") if self._row_lines is None else self._row_lines[rows]
        if not len(lines):
            return []
        begins = self._offsets[lines]
        ends = self._offsets[lines + 1]
        first, last = int(begins.min()), int(ends.max())
        wanted = int((ends - begins).sum())
        descriptor = self._file.fileno()
        if last - first <= min(2 * wanted, 1 << 30):
            block = os.pread(descriptor, last - first, first)
            places = zip((begins - first).tolist(), (ends - first).tolist())
            return [block[begin:end] for begin, end in places]
        return [os.pread(descriptor, end - begin, begin) for begin, end in zip(begins.tolist(), ends.tolist())]

    def _parse(self, line: bytes) -> str | list[str]:
        """Return the row that a line's bytes are."""
        text = line.decode("utf-8").replace(BOM, "").strip()
        if self.columns == 1:
            return text
        return [field.strip() for field in text.split("\t")]


def _open_seekable(path: str) -> BinaryIO:
    """Open a file for as long as it is in use; a pipe, which has no offsets, is copied to a temporary file first."""
    if os.path.isfile(path):
        return open(path, "rb")
    copy = tempfile.NamedTemporaryFile()  # noqa: SIM115  exists until it is closed
    with open(path, "rb") as pipe:
        shutil.copyfileobj(pipe, copy)
    copy.seek(0)
    return copy


class Corpus(TextFile):
    """Documents, or queries, with or without ids: a line is a text, or an id, a tab and a text. A row is the text.

    Ids are unique: a line whose id an earlier line has is left out, and a warning counts these.

    Args:
        path: the file. A pipe is copied to a temporary file first.
        flag: the flag that named the file, for messages.
        columns: 1 or 2; None: as most of the file's first lines have it.

    Raises:
        InputError: as `read_rows`; or an id stands on several lines, with --strict_data, or on more than half of them.
    """

    def __init__(self, path: str, flag: str, columns: int | None = None) -> None:
        super().__init__(path, flag, columns or formats.CORPUS_COLUMNS)
        if self.has_ids:
            self._skip_duplicate_ids(flag)

    def _skip_duplicate_ids(self, flag: str) -> None:
        # Python's hash, which another process has other values of, is enough here, and ten times as fast as a key.
        keys = np.fromiter(map(hash, self.all_ids()), "int64", len(self))
        first_rows = np.unique(keys, return_index=True)[1]
        duplicates = np.delete(np.arange(len(keys)), first_rows)
        if not len(duplicates):
            return
        places = ", ".join(self.place(row) for row in duplicates[:3])
        message = f"{flag} {self.name}: {len(duplicates):,} of {len(keys):,} ids stand on an earlier line too: {places}"
        if settings.strict_data:
            raise InputError(f"{message} (--strict_data)")
        if len(duplicates) > len(keys) / 2:
            raise InputError(f"{message}; expected {formats.EXPECTED[formats.CORPUS_COLUMNS]}")
        warn(f"{message}; these lines were skipped")
        self._row_lines = np.delete(self._row_lines, duplicates)

    @property
    def has_ids(self) -> bool:
        return self.columns == 2

    def ids(self, rows: Sequence[int]) -> list[str | None]:
        """Return the ids of some rows; each None where the corpus has no ids."""
        if not self.has_ids:
            return [None] * len(rows)
        return [super(Corpus, self)._parse(line)[0] for line in self._read(rows)]

    def all_ids(self) -> Iterator[str | None]:
        """Yield the ids of all rows; blocks of them are read together."""
        for start in range(0, len(self), self.BLOCK_ROWS):
            yield from self.ids(range(start, min(start + self.BLOCK_ROWS, len(self))))

    def _parse(self, line: bytes) -> str:
        row = super()._parse(line)
        return row[1] if self.has_ids else row


def read_targets(path: str, flag: str, corpus_file: str | None, *, keep_malformed: bool = False) -> Iterator[Row]:
    """Yield the rows of query and target of a file, as `read_rows` does.

    Args:
        corpus_file: a corpus with ids, if targets are ids: each becomes the text of its document. A row whose id the
            corpus lacks is malformed; where it is kept, its target is "". None: targets are texts.
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
    """Return the rows of query and title of a file."""
    return [(row.fields[0], row.fields[1]) for row in read_rows(path, 2, flag)]


def find_label_problem(fields: list[str]) -> str | None:
    """Return what is wrong with the label of the fields text, text and label; None: it is a number."""
    label = fields[2]
    try:
        number = float(label)
    except ValueError:
        return f"label {label!r} is not a number"
    return None if math.isfinite(number) else f"label {label!r} is not a finite number"


def count_columns(path: str, flag: str, choices: tuple[int, ...], name: str | None = None) -> int:
    """Return how many columns most of the first 1,000 lines of a file have.

    Args:
        path: the file.
        flag: the flag that named it, for messages.
        choices: the numbers that are allowed; of two that as many lines have, the one that comes first in the file.
        name: the file's name in messages, if it is not `path`.

    Raises:
        InputError: no line has one of these numbers of columns, or the file has another format.
    """
    name = name or path
    lines = formats.check_lines(read_lines(path, flag, name), name, flag, choices)
    counts = Counter(line.count("\t") + 1 for _, line in itertools.islice(lines, 1000) if line.strip())
    if not counts:
        raise InputError(f"{flag} {name}: the file is empty")
    allowed = {columns: lines for columns, lines in counts.items() if columns in choices}
    if not allowed:
        expected = " or ".join(map(str, choices))
        raise InputError(f"{flag} {name}: no line has {expected} tab-separated columns")
    return max(allowed, key=allowed.get)


def normalize(text: str) -> str:
    """Return a text without blanks and invisible characters, and with wide characters made narrow.

    Texts that differ only in these look alike to a reader.
    """
    text = unicodedata.normalize("NFKC", text).replace(" ", "")
    if text.isprintable():
        return text
    return "".join(character for character in text if character.isprintable())


def distinct(texts: Iterable[str]) -> list[str]:
    """Return the different texts, in the order of their first appearance."""
    return list(dict.fromkeys(texts))
