"""Read the lines of a UTF-8 file one after the other, or find the offsets at which they begin."""

import codecs
from array import array
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from simcse.console import InputError
from simcse.files import STDIN, show_reading
from simcse.text import formats

import numpy as np

BOM = "\ufeff"
REPLACEMENT = "\ufffd"  # the character that stands for bytes that a conversion lost
SCAN_BYTES = 1 << 22  # of a file that `scan_lines` reads at a time
LINE_FEED, CARRIAGE_RETURN, SPACE = b"\n\r "
OTHER_SPACE = [0xC2, 0xE1, 0xE2, 0xE3, 0xEF]  # first bytes, in UTF-8, of other white space than ASCII's, and of BOMs


def read_lines(path: str, flag: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line of a UTF-8 file, or of stdin as it arrives.

    Lines end in \\n, \\r\\n or \\r. BOMs are removed, also where files were joined.

    Args:
        path: the file; STDIN for stdin.
        flag: the flag that named it, for messages.
        name: the file's name in messages.

    Raises:
        InputError: a line is not UTF-8; the message names the line, and the encoding that it may be in.
    """
    number = 0
    stdin = path == STDIN
    with open(0 if stdin else path, "rb", formats.HEAD_BYTES, closefd=not stdin) as file, show_reading(path) as advance:
        refuse_binary(file.peek(), flag, name)
        for chunk in file:  # ends at \n; other line breaks are inside
            advance(len(chunk))
            for line in chunk.splitlines():  # bytes are split only at \n, \r\n and \r
                number += 1
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = formats.explain_not_utf8(path, name, line, error)
                    raise InputError(f"{flag} {name}:{number}: not UTF-8 at byte {error.start + 1} of the line; "
                                     f"{reason}") from None
                yield number, text.replace(BOM, "")


def refuse_binary(head: bytes, flag: str, name: str) -> None:
    """Raise InputError if a file's first bytes are those of a binary format, or of text in UTF-16 or UTF-32."""
    binary_format = formats.name_binary_format(head, name)
    if binary_format:
        raise InputError(f"{flag} {name}:1: not UTF-8 text, but {binary_format}")


class LineScan(NamedTuple):
    """Where the lines of a file begin, and which ones need a closer look.

    Attributes:
        offsets: int64 [lines + 1], the byte at which each line begins, and where the last one ends.
        maybe_blank: int64, the lines, from 0, that begin with white space and may have nothing else.
        is_plain: whether the file is UTF-8 without tabs and without U+FFFD, so that no line has to be reported.
    """

    offsets: np.ndarray
    maybe_blank: np.ndarray
    is_plain: bool


def scan_lines(file: BinaryIO, advance: Callable[[int], Any]) -> LineScan:
    """Return where the lines of a file begin, without making a string of each line.

    Eight million lines take 2 s and 8 bytes of memory each. The bytes of a chunk are compared as an array: a line
    begins after each line feed, and after each carriage return that no line feed follows.

    Args:
        file: read from where it stands to its end.
        advance: called with the number of bytes of each chunk, for a progress bar.
    """
    begins, maybe_blank = array("q"), array("q")  # grow without a Python object per number
    is_plain = True
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    chunk_offset = 0
    after_break = True  # whether the byte before the chunk ends a line
    while chunk := _read_chunk(file):
        codes = np.frombuffer(chunk, "uint8")
        is_break = codes == LINE_FEED
        if b"\r" in chunk:
            before_line_feed = np.append(is_break[1:], False)
            is_break |= (codes == CARRIAGE_RETURN) & ~before_line_feed
        is_begin = np.concatenate([[after_break], is_break[:-1]])
        chunk_begins = np.flatnonzero(is_begin)
        first_bytes = codes[chunk_begins]
        spaces = np.flatnonzero((first_bytes <= SPACE) | np.isin(first_bytes, OTHER_SPACE))
        maybe_blank.frombytes((spaces + len(begins)).tobytes())
        begins.frombytes((chunk_begins + chunk_offset).tobytes())
        if is_plain:
            is_plain = b"\t" not in chunk and REPLACEMENT not in decoder.decode(chunk)
        after_break = is_break[-1]
        chunk_offset += len(chunk)
        advance(len(chunk))
    begins.append(chunk_offset)
    cut_off = bool(decoder.getstate()[0])  # the file ends within a character
    return LineScan(np.frombuffer(begins, "int64"), np.frombuffer(maybe_blank, "int64"), is_plain and not cut_off)


def _read_chunk(file: BinaryIO) -> bytes:
    """Return the next bytes of a file, which do not end between \\r and \\n; b"": the end of the file."""
    chunk = file.read(SCAN_BYTES)
    while chunk.endswith(b"\r"):
        following = file.read(1)
        if not following:
            break
        chunk += following
    return chunk
