"""Text files in lines and columns: their rows, checked and counted, and rows found again by their offsets."""

import codecs
import itertools
import math
import os
import shutil
import tempfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from simcse.console import InputError, settings, warn, warn_data
from simcse.files import STDIN, reading
from simcse.text import encodings, formats

import numpy as np

BOM = "\ufeff"
REPLACEMENT = "\ufffd"  # the character that stands for bytes that a conversion lost
BLANK = "blank"  # the problem of a line without text


def _decode(line: bytes, path: str, name: str, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        cause = formats.named(encodings.not_utf8(path, line, error), name)
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1} of the line; {cause}") from None


def _refuse_bytes(head: bytes, flag: str, name: str) -> None:
    if kind := encodings.known_bytes(head):
        raise InputError(f"{flag} {name}:1: not UTF-8 text in lines, but {formats.named(kind, name)}")


def _lines(path: str, flag: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of the lines of a UTF-8 file or of stdin as it comes; BOMs, wherever files were
    joined, are left out. `name` is that of the file in messages."""
    number, stdin = 0, path == STDIN
    with open(0 if stdin else path, "rb", encodings.BLOCK, closefd=not stdin) as file, reading(path) as advance:
        _refuse_bytes(file.peek(), flag, name)
        for chunk in file:
            advance(len(chunk))
            for line in chunk.splitlines():  # of bytes: splits at \n, \r\n and \r, and nowhere else
                number += 1
                yield number, _decode(line, path, name, f"{flag} {name}:{number}").replace(BOM, "")


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

    @property
    def fate(self) -> str:
        return "no result (NaN, empty or null)" if self.keep_malformed else "skipped"

    def add(self, row: Row) -> None:
        """Count a row. Of stdin, where somebody waits for an answer, warn of the first malformed ones at once.

        Raises:
            InputError: the row has a problem, and --strict_data is given.
        """
        self.total += 1
        place = f"{self.name}:{row.line_number}"
        if any(REPLACEMENT in field for field in row.fields):
            self.lossy.append(place)
        if row.problem is None:
            return
        if settings.strict_data:
            raise InputError(f"{self.flag} {place}: {row.problem} (--strict_data)")
        if row.problem == BLANK:
            self.blank += 1
        else:
            self.malformed += 1
        if len(self.problems) < self.SHOWN:
            self.problems.append(f"{place} ({row.problem})")
            if self.name == "stdin":
                warn(f"{self.flag} {place}: {self.fate}; {row.problem}")

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
            raise InputError(f"{where}: the file holds no text")
        if good == 0 or (self.malformed > good and not answered):
            raise InputError(f"{where}: {report}")
        if self.problems:
            warn(f"{where}: {self.fate}; {report}; mend them or take them out")
        if self.lossy:
            warn_data(f"{where}: {len(self.lossy)} of {self.total} lines have U+FFFD, which stands for bytes that were "
                     f"lost when the file was converted; convert it again: {', '.join(self.lossy[: self.SHOWN])}")


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
    lines = _lines(path, flag, name)
    if check_format:
        lines = formats.checked(lines, name, flag, (columns,))
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
    """The rows of `read_rows`, whose arguments and errors it has, found by their offsets and read when asked for: 8
    bytes of memory a line. Of one column a row is a text, of several a list of texts. A pipe is copied first."""

    _CHUNK, _BLOCK = 1 << 22, 1024

    def __init__(self, path: str, flag: str, columns: int | tuple[int, ...] = 1) -> None:
        self._lines = None  # the numbers of the texts' lines, from 0; None: all of the file's
        self.name = path  # in messages
        self._file = open(path, "rb")  # noqa: SIM115  read from as long as this object lives
        if not os.path.isfile(path):
            with self._file as pipe:
                self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
                shutil.copyfileobj(pipe, self._file)
            path = self._file.name
            self._file.seek(0)
        self.path = path
        _refuse_bytes(os.pread(self._file.fileno(), encodings.BLOCK, 0), flag, self.name)
        known = not isinstance(columns, int)
        self.columns = count_columns(path, flag, columns, self.name) if known else columns
        with reading(path) as advance:
            simple, maybe_blank = self._scan(advance)
        if self.columns > 1 or not simple:  # something may have to be reported, or left out
            rows = read_rows(path, self.columns, flag, name=self.name, check_format=not known)
            self._lines = np.fromiter((row.line_number - 1 for row in rows), "int32")
        elif blank := [row for row in maybe_blank if not self[row]]:
            self._lines = np.delete(np.arange(len(self), dtype="int32"), blank)
        if not len(self):
            raise InputError(f"{flag} {self.name}: the file holds no text")
        if not known and simple and not settings.plain_text:
            formats.refuse_other_formats(self[: formats.SAMPLE], self.name, flag, (columns,))

    def _scan(self, advance: Callable[[int], Any]) -> tuple[bool, array]:
        """Find where lines start. Returns whether all is UTF-8 without tabs; and the numbers, from 0, of the lines that
        may be blank, by their first byte."""
        starts, maybe_blank, simple, offset, after_break = array("q"), array("q"), True, 0, True
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while chunk := self._file.read(self._CHUNK):
            while chunk.endswith(b"\r") and (more := self._file.read(1)):  # \r\n is one break
                chunk += more
            codes = np.frombuffer(chunk, "uint8")
            breaks = codes == 10
            if b"\r" in chunk:
                breaks |= (codes == 13) & ~np.append(breaks[1:], False)
            begins = np.flatnonzero(np.concatenate([[after_break], breaks[:-1]]))
            first = codes[begins]
            odd = np.flatnonzero((first <= 32) | np.isin(first, (0xC2, 0xE1, 0xE2, 0xE3, 0xEF)))
            maybe_blank.frombytes((odd + len(starts)).tobytes())
            starts.frombytes((begins + offset).tobytes())
            offset, after_break = offset + len(chunk), breaks[-1]
            simple = simple and b"\t" not in chunk and "\ufffd" not in decoder.decode(chunk)
            advance(len(chunk))
        starts.append(offset)
        self._starts = np.frombuffer(starts, "int64")  # and where the last line ends
        return simple and not decoder.getstate()[0], maybe_blank

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._lines is None else len(self._lines)

    def line_number(self, row: int) -> int:
        """The number, from 1, of a text's line in the file."""
        return 1 + int(row if self._lines is None else self._lines[row])

    def place(self, row: int) -> str:
        """Where a text stands, as file:line."""
        return f"{self.name}:{self.line_number(row)}"

    def take(self, rows: Sequence[int]) -> list[str]:
        """The texts of some rows; where they stand close together, their part of the file is read at once."""
        return list(map(self._row, self._take(rows)))

    def _take(self, rows: Sequence[int]) -> list[bytes]:
        lines = np.asarray(rows, "int64") if self._lines is None else self._lines[rows]
        begins, ends = self._starts[lines], self._starts[lines + 1]
        offset, end = int(begins.min(initial=self._starts[-1])), int(ends.max(initial=0))
        if end - offset > min(2 * (ends - begins).sum(), 1 << 30):
            return [os.pread(self._file.fileno(), end - begin, begin)
                    for begin, end in zip(begins.tolist(), ends.tolist())]
        block = os.pread(self._file.fileno(), max(0, end - offset), offset)
        places = zip((begins - offset).tolist(), (ends - offset).tolist())
        return [block[begin:end] for begin, end in places]

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self.take(range(len(self))[row])
        return self.take([range(len(self))[row]])[0]

    def __iter__(self):
        """Yield the rows in their order, read by blocks of the file."""
        for start in range(0, len(self), self._BLOCK):
            yield from self[start : start + self._BLOCK]

    def _row(self, line: bytes) -> str | list[str]:
        text = line.decode("utf-8").replace(BOM, "").strip()
        return text if self.columns == 1 else [field.strip() for field in text.split("\t")]

    def spread(self, count: int) -> list[tuple[str, Any]]:
        """So many rows from all over the file, in its order, each with its place."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return [(self.place(row), self[row]) for row in rows]

    def sample(self, count: int) -> list[str]:
        """The different texts of so many rows from all over the file, in its order."""
        return distinct(text for _, row in self.spread(count) for text in ([row] if isinstance(row, str) else row))


class Corpus(TextFile):
    """Documents, or queries: a row is a text, whose line is the text, or an id, a tab and the text. `columns` is 1 or
    2; None: what most of the first lines have. Ids are unique: a line with an earlier one is reported and left out, and
    where most are such ones, or with --strict_data, there is an InputError."""

    def __init__(self, path: str, flag: str, columns: int | None = None) -> None:
        super().__init__(path, flag, columns or formats.IDS)
        if not self.has_ids:
            return
        keys = np.fromiter(map(hash, self.all_ids()), "int64", len(self))
        again = np.delete(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
        if not len(again):
            return
        said = (f"{flag} {self.name}: {len(again):,} of {len(keys):,} ids stand on an earlier line as well: "
                f"{', '.join(map(self.place, again[:3]))}")
        if settings.strict_data or len(again) > len(keys) / 2:
            raise InputError(said + (" (--strict_data)" if settings.strict_data else
                                     f"; {flag} has a text a line, or an id, a tab and a text"))
        warn(f"{said}; skipped")
        self._lines = np.delete(self._lines, again)

    @property
    def has_ids(self) -> bool:
        return self.columns == 2

    def ids(self, rows: Sequence[int]) -> list[str | None]:
        """The ids of some rows; None where there are none."""
        both = super()._row
        return [both(line)[0] for line in self._take(rows)] if self.has_ids else [None] * len(rows)

    def all_ids(self) -> Iterator[str | None]:
        """Yield the ids of all rows, read by blocks of the file."""
        for start in range(0, len(self), self._BLOCK):
            yield from self.ids(range(start, min(start + self._BLOCK, len(self))))

    def _row(self, line: bytes) -> str:
        return super()._row(line)[1] if self.has_ids else super()._row(line)


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


def not_a_number(row: list[str]) -> str | None:
    """What is wrong with the label of two texts and a label."""
    try:
        return None if math.isfinite(float(row[2])) else f"label {row[2]!r} is not a finite number"
    except ValueError:
        return f"label {row[2]!r} is not a number"


def count_columns(path: str, flag: str, choices: tuple[int, ...], name: str | None = None) -> int:
    """Which of `choices` is the number of columns of most of the first 1,000 lines; of as many the one that comes
    first. InputError: none, or another format, unless --plain_text. `name` is that of the file in messages."""
    name = name or path
    first = itertools.islice(formats.checked(_lines(path, flag, name), name, flag, choices), 1000)
    counted = Counter(line.count("\t") + 1 for _, line in first if line.strip())
    if found := [count for count in counted if count in choices]:
        return max(found, key=counted.get)
    raise InputError(f"{flag} {name}: {'' if counted else 'the file holds no text; '}no line has "
                     f"{' or '.join(map(str, choices))} tab-separated columns")


def plain(text: str) -> str:
    """A text without what the eye does not see: white space, invisible characters, and how wide characters are."""
    text = unicodedata.normalize("NFKC", text).replace(" ", "")
    return text if text.isprintable() else "".join(filter(str.isprintable, text))


def distinct(texts: Iterable[str]) -> list[str]:
    """The different texts, in the order of their first appearance."""
    return list(dict.fromkeys(texts))
