"""Keep the words of all documents on the disk, so that they are split once although they are needed twice."""

import json
import os
from collections.abc import Sequence
from typing import BinaryIO


class WordFile:
    """The words of blocks of documents, in a temporary file.

    Workers forked after `flush` can read it.

    Args:
        file: an empty binary file, open for reading and writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begins = [0]  # of each block, in bytes; at last the end of the file

    def append(self, encoded: str) -> None:
        """Add a block that `encode` has encoded."""
        self._begins.append(self._begins[-1] + self._file.write(encoded.encode()))

    def flush(self) -> None:
        """Write what is buffered, after the last `append` and before the first `read`."""
        self._file.flush()

    def read(self, block: int) -> list[list[str]]:
        """Return for each document of a block its words.

        Args:
            block: its number, from 0, in the order of `append`.
        """
        begin = self._begins[block]
        # Workers share one place in the file, which pread leaves alone.
        return json.loads(os.pread(self._file.fileno(), self._begins[block + 1] - begin, begin))


def encode(words_of_documents: Sequence[Sequence[str]]) -> str:
    """Return the words of a block of documents as `WordFile.append` takes them."""
    return json.dumps(words_of_documents, ensure_ascii=False)
