"""What has a vector in an index, and which lines of the corpus that is."""

import os
from collections.abc import Sequence
from itertools import islice

from simcse.console import progress
from simcse.text.passages import Passages
from simcse.text.textfile import Corpus
from simcse.text.tokens import WINDOW

import numpy as np

Line = tuple[int | None, str | None]  # its number, from 1, and its document's id, None where they are not known


class Entries(Sequence):
    """What an index has a vector of: the distinct texts of a corpus, in the order of their first lines. Copies would
    break the graph: they are each other's neighbours, and nothing leads out of them.

    An entry is a row of the index, or, with `passages`, several. `rows`, int32, are the corpus' rows, entry by entry:
    rows[starts[e] : starts[e + 1]] have the text of entry e, in their order. Equal texts are found by a hash of 64
    bits, whose key is another in every process: the odds that any two of 8 million are taken for one are 2 in a
    million.

    Args:
        folder: where `save` has written the two, which are then mapped instead of read; None: they are found.
    """

    def __init__(self, corpus: Corpus, folder: str | None = None) -> None:
        self.corpus, self.documents = corpus, len(corpus)
        self.passages: Passages | None = None
        self._keys: np.ndarray | None = None
        if folder:
            both = np.load(os.path.join(folder, "entries.npy"), mmap_mode="r")
            self.rows, self.starts = np.split(both, [len(corpus)])
            return
        keys = _hashes(corpus)
        _, first, entry, lines = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        self.rows = np.argsort(first[entry], kind="stable").astype("int32")
        self.starts = np.append(0, np.cumsum(lines[np.argsort(first)])).astype("int32")
        self._keys = keys[np.sort(first)]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def vectors(self) -> "Entries | Passages":
        """What the rows of the index are."""
        return self if self.passages is None else self.passages

    def __getitem__(self, entry):
        rows = self.rows[self.starts[:-1][entry]]
        return self.corpus.take(rows) if rows.ndim else self.corpus[int(rows)]

    def lines(self, entry: int, most: int | None = None) -> list[Line]:
        """The first `most` lines of an entry in the corpus' file; None: all."""
        start, end = self.starts[entry : entry + 2]
        rows = self.rows[start:end][:most]
        return list(zip(map(self.corpus.line_number, rows), self.corpus.ids(rows)))

    def place(self, entry: int) -> str:
        """Where the first line of an entry stands, as file:line."""
        return self.corpus.place(int(self.rows[self.starts[entry]]))

    def take(self, entries: Sequence[int], most: int | None = None) -> list[tuple[str, list[Line]]]:
        """The texts of some entries, and their `lines`."""
        return [(self[entry], self.lines(entry, most)) for entry in entries]

    def hashes(self) -> np.ndarray:
        """Python's hash of each text, int64, the same for the same text in this process alone."""
        return _hashes(self.corpus)[self.rows[self.starts[:-1]]] if self._keys is None else self._keys

    def find(self, others: "Entries") -> np.ndarray:
        """Which entry has the text of each of the others, int64 [others]; -1: none."""
        own, theirs = self.hashes(), others.hashes()
        order = np.argsort(own)
        places = order[np.searchsorted(own, theirs, sorter=order).clip(max=len(own) - 1)]
        return np.where(own[places] == theirs, places, -1)

    def rows_from(self, first: np.ndarray) -> np.ndarray:
        """Where each row is in an index in which each entry's first row is at `first`, int64; -1: not there."""
        if self.passages is None:
            return first
        rows = np.arange(len(self.passages))
        own = self.passages.documents_of(rows)
        return np.where(first[own] < 0, -1, first[own] + rows - self.passages.starts[own])

    def save(self, folder: str) -> None:
        np.save(os.path.join(folder, "entries.npy"), np.append(self.rows, self.starts))
        if self.passages is not None:
            self.passages.save(folder)


def _hashes(corpus: Corpus) -> np.ndarray:
    """A hash of each text, int64 [rows], the same for the same text in this process alone."""
    with progress("looking for copies", len(corpus), "documents") as advance:
        keys, texts = np.empty(len(corpus), "int64"), iter(corpus)
        for block in np.split(keys, range(WINDOW, len(keys), WINDOW)):
            block[:] = np.fromiter(map(hash, islice(texts, len(block))), "int64")
            advance(len(block))
    return keys
