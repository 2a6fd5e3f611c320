"""Text files: what comes in, and files that are written whole or not at all.

This module is light on purpose (numpy only).
"""

import codecs
import contextlib
import hashlib
import itertools
import math
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar

from console import HOW_TO_INSTALL, InputError, be_answering, log, progress, warn

# One thread a matrix product, so that what numpy computes does not depend on their number; ann_util runs several
# products side by side. This module is the first of the project's that a script imports.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
try:
    import numpy as np
except ModuleNotFoundError:
    sys.exit(f"numpy {HOW_TO_INSTALL}")

DEFAULT_MODEL = "rocketqa-zh-base-query-encoder"
RECALL_KS = (1, 5, 10, 20, 50)
POOLINGS = ("pooler", "cls", "mean", "first_last_avg")  # see model.py
VECTOR_TYPES = ("float32", "int8")  # of an exact index; see ann_util.py
# Texts tokenized and sorted by length at a time: enough to make batches of even length, little enough to stream.
WINDOW = 16384
STDIN = "-"  # the path that means stdin
Item = TypeVar("Item")


def _runs(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def new_file(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when all is written; on an error `path` stays as it was."""
    parent, name = os.path.split(path)
    os.makedirs(parent or ".", exist_ok=True)
    for other in os.listdir(parent or "."):  # what a killed process left
        found = re.fullmatch(re.escape(name) + r"\.(\d+)\.tmp", other)
        if found and not _runs(int(found[1])):
            os.remove(os.path.join(parent, other))
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save_embeddings(path: str, embeddings: np.ndarray) -> None:
    """Write embeddings as .npy, complete or not at all."""
    with new_file(path, "wb") as file:
        np.save(file, embeddings)
    log(f"wrote {embeddings.shape[0]} x {embeddings.shape[1]} float32 to {path}")


def load_embeddings(path: str, flag: str, rows: int) -> np.ndarray:
    """L2-normalized float32 embeddings [rows, dim] that `save_embeddings` wrote, read from the file as they are used.

    Raises:
        InputError: no such array, or of another number of rows.
    """
    try:
        embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: not an .npy file: {error}") from None
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f" or len(embeddings) != rows:
        raise InputError(f"{flag} {path}: {embeddings.dtype} {list(embeddings.shape)} instead of float32 "
                         f"[{rows}, dimensions]")
    return embeddings


def reading(path: str) -> contextlib.AbstractContextManager[Callable]:
    """`console.progress` of reading a file, in bytes."""
    if path == STDIN:  # how long that takes is not ours
        return contextlib.nullcontext(lambda count: None)
    return progress(f"reading {path}", os.path.getsize(path) if os.path.isfile(path) else None, "B")


def file_digest(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, reading(path) as advance:
        while block := file.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            cause = "it looks like UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
        else:
            try:
                line.decode("gb18030")
                cause = "it looks like GBK; convert it: iconv -f GB18030 -t UTF-8"
            except UnicodeDecodeError:
                cause = "the file is damaged or not text"
        raise InputError(f"{where}: not UTF-8 at byte {error.start + 1} of the line; {cause}") from None


BOM = codecs.BOM_UTF8


def _name(path: str) -> str:
    return "stdin" if path == STDIN else path


def _lines(path: str, flag: str) -> Iterator[tuple[str, int, str]]:
    """Yield (file:line, offset, line) of a UTF-8 file or of stdin as it comes, BOM and line ends (\\n, \\r\\n or \\r)
    removed, blank lines left out."""
    number = offset = 0
    stdin = path == STDIN
    with open(0 if stdin else path, "rb", closefd=not stdin) as file, reading(path) as advance:
        for chunk in file:
            advance(len(chunk))
            for line in chunk.splitlines(keepends=True):  # of bytes: splits at \n, \r\n and \r, and nowhere else
                number += 1
                where, start = f"{_name(path)}:{number}", offset
                offset += len(line)
                if number == 1 and line.startswith(BOM):
                    line, start = line.removeprefix(BOM), len(BOM)
                text = _decode(line.rstrip(b"\r\n"), f"{flag} {where}")
                if text.strip():
                    yield where, start, text


def read_rows(path: str, columns: int, flag: str, strict: bool = False,
              check: Callable[[list[str]], str | None] | None = None) -> Iterator[list[str]]:
    """Stream the rows of a tab-separated text file.

    Every field loses the white space around it and keeps what is inside. Blank lines are skipped. A row with
    another number of columns, an empty field, or for which `check(row)` returns a complaint is skipped, counted,
    and reported on stderr with file:line of the first three; of stdin these three are reported at once as well.

    Args:
        path: a UTF-8 file, with or without BOM, lines ending in \\n, \\r\\n or \\r; STDIN: stdin.
        columns: how many fields a good row has.
        flag: the flag that named the file, for messages.
        strict: raise at the first bad row.

    Raises:
        InputError: not UTF-8; a bad row where `strict`; more than half of the rows bad; no good row.
    """
    return (row for _, row in _good_rows(path, columns, flag, strict, check))


def _good_rows(path: str, columns: int, flag: str, strict: bool,
               check: Callable[[list[str]], str | None] | None = None) -> Iterator[tuple[int, list[str]]]:
    """The rows of `read_rows`, each with the offset at which its line starts."""
    good, bad, first_bad = 0, 0, []
    for where, offset, line in _lines(path, flag):
        row = [field.strip() for field in line.split("\t")]
        if len(row) != columns:
            complaint = f"columns: {len(row)} instead of {columns}"
        elif not all(row):
            complaint = "an empty field"
        else:
            complaint = check(row) if check else None
        if complaint is None:
            good += 1
            yield offset, row
        elif strict:
            raise InputError(f"{flag} {where}: {complaint} (--strict_data)")
        else:
            bad += 1
            if bad <= 3:
                first_bad.append(f"{where} ({complaint})")
                if path == STDIN:  # whoever waits for the answer has to know
                    warn(f"{flag} {where}: skipped; {complaint}")
    report = f"{bad} of {good + bad} lines are malformed: {', '.join(first_bad)}"
    if bad > good or not good:
        raise InputError(f"{flag} {_name(path)}: {report}" if bad else f"{flag} {_name(path)}: the file holds no text")
    if bad:
        warn(f"{flag} {_name(path)}: skipped; {report}")


def arriving(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield what has come of `items` so far, as soon as there is any, WINDOW at most at a time.

    So a line typed is answered at once, and a long file is encoded in large batches. A thread reads on meanwhile; an
    error of `items` is raised after what came before it.
    """
    be_answering()
    come: queue.Queue[Item | Exception] = queue.Queue(WINDOW)

    def read() -> None:
        try:
            while True:
                come.put(next(items))
        except Exception as end:  # StopIteration among them
            come.put(end)

    threading.Thread(target=read, daemon=True).start()  # daemon: it may wait for a line when all else has ended
    while True:
        block = [come.get()]
        while len(block) < WINDOW and not come.empty():
            block.append(come.get())
        end = block.pop() if isinstance(block[-1], Exception) else None
        if block:
            yield block
        if isinstance(end, StopIteration):
            return
        if end:
            raise end


def read_texts(path: str, flag: str, strict: bool = False) -> list[str]:
    """One text a line."""
    return [text for (text,) in read_rows(path, 1, flag, strict)]


class TextFile(Sequence):
    """The texts that `read_texts` gives, found by their offsets and read when asked for: 8 bytes of memory a line. Of
    several columns a row is a list of texts.

    Arguments and errors are those of `read_rows`. A pipe is copied to a temporary file first.
    """

    _CHUNK = 1 << 22
    _LINE = re.compile(rb"[^\r\n]*")

    def __init__(self, path: str, flag: str, strict: bool = False, columns: int = 1) -> None:
        self.columns = columns
        self._file = open(path, "rb")  # noqa: SIM115  read from as long as this object lives
        if not os.path.isfile(path):
            with self._file as pipe:
                self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
                shutil.copyfileobj(pipe, self._file)
            path = self._file.name
            self._file.seek(0)
        self.path = path
        self._starts, self._size = np.zeros(0, "int64"), os.path.getsize(path)
        with reading(path) as advance:
            starts, doubtful = self._scan(advance) if columns == 1 else (None, array("q"))
        if starts is None:  # something is there to be reported, or to be left out
            starts, doubtful = array("q", (offset for offset, _ in _good_rows(path, columns, flag, strict))), []
        self._starts = np.frombuffer(starts, "int64")
        if blank := [row for row in doubtful if not self[row]]:
            self._starts = np.delete(self._starts, blank)
        if not len(self):
            raise InputError(f"{flag} {path}: the file holds no text")

    def _scan(self, advance: Callable[[int], Any]) -> tuple[array | None, array]:
        """The offsets of the lines that are not empty, None if any has a tab or is not UTF-8; and the numbers of those
        that may be white space alone, by their first byte."""
        starts, doubtful, offset, after_break = array("q"), array("q"), 0, True
        decoder = codecs.getincrementaldecoder("utf-8")()
        while chunk := self._file.read(self._CHUNK):
            if not offset and chunk.startswith(BOM):
                chunk = chunk.replace(BOM, b"\n" * len(BOM), 1)
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                return None, doubtful
            if b"\t" in chunk:
                return None, doubtful
            codes = np.frombuffer(chunk, "uint8")
            breaks = (codes == 10) | (codes == 13)
            found = np.flatnonzero(~breaks & np.concatenate([[after_break], breaks[:-1]]))
            odd = np.flatnonzero((codes[found] <= 32) | np.isin(codes[found], (0xC2, 0xE1, 0xE2, 0xE3)))
            doubtful.frombytes((odd + len(starts)).tobytes())
            starts.frombytes((found + offset).tobytes())
            offset, after_break = offset + len(chunk), breaks[-1]
            advance(len(chunk))
        if decoder.getstate()[0]:
            return None, doubtful
        return starts, doubtful

    def __len__(self) -> int:
        return len(self._starts)

    def line_number(self, row: int) -> int:
        """The number, from 1, of a text's line in the file."""
        before, breaks = b"", 1
        for start in range(0, int(self._starts[row]), self._CHUNK):
            chunk = os.pread(self._file.fileno(), min(self._CHUNK, int(self._starts[row]) - start), start)
            breaks += chunk.count(b"\n") + chunk.count(b"\r") - (before[-1:] + chunk).count(b"\r\n")
            before = chunk
        return breaks

    def take(self, rows: Iterable[int]) -> list[str]:
        """The texts of some rows."""
        return [self[row] for row in rows]

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        row = range(len(self))[row]
        start, end = int(self._starts[row]), int(self._starts[row + 1]) if row + 1 < len(self) else self._size
        line = self._LINE.match(os.pread(self._file.fileno(), end - start, start))[0].decode("utf-8").strip()
        return line if self.columns == 1 else [field.strip() for field in line.split("\t")]

    def sample(self, count: int) -> list[str]:
        """The different texts of so many rows from all over the file, in its order."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return distinct(text for row in rows for text in ([self[row]] if self.columns == 1 else self[row]))


def read_text_pairs(path: str, flag: str, strict: bool = False) -> list[tuple[str, str]]:
    """Two texts a line: query and title."""
    return [(query, title) for query, title in read_rows(path, 2, flag, strict)]


def read_labeled_pairs(path: str, flag: str, strict: bool = False) -> list[tuple[str, str, float]]:
    """Two texts and a number a line."""
    def not_a_number(row: list[str]) -> str | None:
        try:
            return None if math.isfinite(float(row[2])) else f"label {row[2]!r} is not a finite number"
        except ValueError:
            return f"label {row[2]!r} is not a number"

    return [(a, b, float(label)) for a, b, label in read_rows(path, 3, flag, strict, not_a_number)]


def count_columns(path: str, flag: str, choices: tuple[int, ...]) -> int:
    """Which of `choices` is the number of columns of most of the first 1,000 lines; of as many the one that comes
    first."""
    counted = Counter(itertools.islice((line.count("\t") + 1 for _, _, line in _lines(path, flag)), 1000))
    if found := [count for count in counted if count in choices]:
        return max(found, key=counted.get)
    raise InputError(f"{flag} {path}: {'' if counted else 'the file holds no text; '}no line has "
                     f"{' or '.join(map(str, choices))} tab-separated columns")


def distinct(texts: Iterable[str]) -> list[str]:
    """The different texts, in the order of their first appearance."""
    return list(dict.fromkeys(texts))
