"""The documents of a corpus: its distinct texts, the lines that have each, and the rows that an index has of them."""

import os
from collections.abc import Sequence
from itertools import islice
from typing import Any

from simcse.console import InputError, count, log, progress
from simcse.index.key_table import KeyTable
from simcse.index.protocols import NOT_FOUND, Document, Line
from simcse.machine import RANK
from simcse.text.keys import passage_keys, text_keys
from simcse.text.passages import Passages
from simcse.text.textfile import Corpus
from simcse.text.tokens import WINDOW

import numpy as np

LINES_FILE = "documents.npy"
KEYS_FILE = "keys.npy"


class Documents(Sequence):
    """The distinct texts of a corpus, in the order of their first lines. As a sequence, the texts.

    Copies of a text are one document. A row of the index for every copy would break an HNSW graph: the nearest
    neighbours of a copy are the other copies, so a search that comes to one of them finds no links to other texts.

    An index has a row for each document, or, after `split`, for each passage of one; see `DocumentStore`. Texts are
    told apart by their keys (`text_keys`).

    Args:
        corpus: the texts.
        folder: where `save` has written the documents, which are then mapped into memory; None: the lines of the corpus
            are grouped now.

    Attributes:
        passages: those of all documents; None: a row is a document.
        keys: int64 [documents], `text_keys` of their texts.
        line_count: lines of the corpus.

    Raises:
        InputError: two different texts have the same key.
    """

    def __init__(self, corpus: Corpus, folder: str | None = None) -> None:
        self.corpus = corpus
        self.line_count = len(corpus)
        self.passages: Passages | None = None
        # The lines of document d are rows self._lines[self._starts[d] : self._starts[d + 1]] of the corpus, int32.
        if folder:
            both = np.load(os.path.join(folder, LINES_FILE), mmap_mode="r")
            self._lines = both[: len(corpus)]
            self._starts = both[len(corpus) :]
            self.keys = np.load(os.path.join(folder, KEYS_FILE), mmap_mode="r")
        else:
            self._group_lines(_read_keys(corpus))

    def _group_lines(self, keys: np.ndarray) -> None:
        """Find the documents and their lines by the key of each line, int64 [lines]."""
        # np.unique sorts documents by their keys; further down they are put in the order of their first lines.
        _, first_line_of_document, document_of_line, line_count_of_document = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True)
        first_line_of_line = first_line_of_document[document_of_line]
        _check_copies(self.corpus, first_line_of_line)

        by_first_line = np.argsort(first_line_of_document)
        self.keys = keys[first_line_of_document[by_first_line]]
        self._starts = np.append(0, np.cumsum(line_count_of_document[by_first_line])).astype("int32")
        # Stable: the lines of a document stay in their order.
        self._lines = np.argsort(first_line_of_line, kind="stable").astype("int32")

    def split(self, tokenizer: Any, max_seq_length: int) -> None:
        """Split all documents into passages of at most so many tokens; each is a row of the index."""
        self.passages = Passages.split(self, tokenizer, max_seq_length)

    def save(self, folder: str) -> None:
        """Write the documents, without the corpus, to a folder."""
        np.save(os.path.join(folder, LINES_FILE), np.append(self._lines, self._starts))
        np.save(os.path.join(folder, KEYS_FILE), self.keys)
        if self.passages is not None:
            self.passages.save(folder)

    @staticmethod
    def load_keys(folder: str) -> np.ndarray:
        """Return the keys of the documents that `save` has written, int64 [documents]."""
        return np.load(os.path.join(folder, KEYS_FILE))

    @classmethod
    def load_row_keys(cls, folder: str, has_passages: bool) -> np.ndarray:
        """Return the keys of the rows that `save` has written, int64 [rows]."""
        keys = cls.load_keys(folder)
        if not has_passages:
            return keys
        passages = Passages.load(keys, folder)
        return keys_of_passages(keys, passages.starts, passages.offsets)

    # ---------------------------------------------------------------------------------------------------- documents
    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, document):
        """Return the text of a document, or those of a slice or an array of documents."""
        first_lines = self._lines[self._starts[:-1][document]]
        if first_lines.ndim:
            return self.corpus.read(first_lines)
        return self.corpus[int(first_lines)]

    def place(self, document: int) -> str:
        """Return where the first line of a document stands, as file:line."""
        return self.corpus.place(int(self._lines[self._starts[document]]))

    def lines(self, document: int, max_lines: int | None = None) -> list[Line]:
        """Return the first lines that have the text of a document; None: all of them."""
        rows = self._lines[self._starts[document] : self._starts[document + 1]][:max_lines]
        return [Line(self.corpus.line_number(row), id) for row, id in zip(rows, self.corpus.ids(rows))]

    def line_counts(self, documents: np.ndarray) -> np.ndarray:
        """Return how many lines have the text of each of some documents, int32."""
        return self._starts[1:][documents] - self._starts[:-1][documents]

    def copies(self) -> np.ndarray:
        """Return the rows of the corpus whose text stands in an earlier row too, ascending, int32."""
        return np.sort(np.delete(self._lines, self._starts[:-1]))

    def read(self, documents: Sequence[int], max_lines: int | None = None) -> list[Document]:
        """Return some documents, each with its first lines; None: with all of them."""
        return [Document(self[document], self.lines(document, max_lines)) for document in documents]

    # --------------------------------------------------------------------------------------------- rows of the index
    @property
    def has_passages(self) -> bool:
        return self.passages is not None

    @property
    def row_texts(self) -> Sequence[str]:
        """The text of each row of the index."""
        return self if self.passages is None else self.passages

    @property
    def row_count(self) -> int:
        return len(self.row_texts)

    def row_keys(self) -> np.ndarray:
        """Return the key of each row, int64 [rows].

        Raises:
            InputError: two passages have the same key.
        """
        if self.passages is None:
            return self.keys
        keys = keys_of_passages(self.keys, self.passages.starts, self.passages.offsets)
        if len(np.unique(keys)) < len(keys):
            raise InputError(f"{self.corpus.name}: two passages have the same 64-bit key; leave out --passages")
        return keys

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the document of each row, int64 of the same shape; NOT_FOUND stays."""
        if self.passages is None:
            return rows
        return np.where(rows < 0, NOT_FOUND, self.passages.documents_of(rows))

    def begin_documents(self, rows: np.ndarray) -> np.ndarray:
        """Return whether each row is the first one of its document, bool [rows]."""
        if self.passages is None:
            return np.ones(len(rows), bool)
        return rows == self.passages.starts[self.documents_of(rows)]

    def rows_of(self, document: int) -> np.ndarray:
        """Return the rows of a document, int64."""
        if self.passages is None:
            return np.array([document])
        return self.passages.rows_of(document)

    def passage_texts(self, rows: Sequence[int]) -> list[str]:
        """Return the texts of some passages."""
        return self.passages[np.asarray(rows, "int64")]


def _read_keys(corpus: Corpus) -> np.ndarray:
    """Return the key of each line of the corpus, int64 [lines]."""
    keys = np.empty(len(corpus), "int64")
    texts = iter(corpus)
    with progress("looking for copies", len(corpus), "documents") as advance:
        for start in range(0, len(corpus), WINDOW):
            block = text_keys(islice(texts, WINDOW))
            keys[start : start + len(block)] = block
            advance(len(block))
    return keys


def _check_copies(corpus: Corpus, first_line: np.ndarray) -> None:
    """Raise InputError if a line's text differs from that of the first line with the same key.

    Args:
        first_line: int64 [lines], that row of the corpus for each.
    """
    copies = np.flatnonzero(first_line != np.arange(len(corpus)))
    for start in range(0, len(copies), WINDOW):
        rows = copies[start : start + WINDOW]
        texts = corpus.read(rows)
        first_texts = corpus.read(first_line[rows])
        for row, text, first_text in zip(rows, texts, first_texts):
            if text != first_text:
                raise InputError(f"{corpus.place(row)}: has the same 64-bit key as another text, "
                                 f"{corpus.place(first_line[row])}; change or remove one of the two")


def keys_of_passages(document_keys: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the keys of the passages of all documents, int64 [passages].

    Args:
        document_keys: int64 [documents].
        starts, offsets: see `Passages`.
    """
    counts = np.diff(starts)
    return passage_keys(np.repeat(document_keys, counts), offsets)


def report_changes(documents: Documents, previous_keys: np.ndarray, where: str) -> None:
    """Log how many documents are new, and gone, since an index was built.

    Args:
        documents: the corpus now.
        previous_keys: int64 [documents then], their keys.
        where: the flag that names the index, and its value.

    Raises:
        InputError: all are new, so that the index is of another corpus.
    """
    new = int(np.count_nonzero(KeyTable(previous_keys).find(documents.keys) == NOT_FOUND))
    gone = len(previous_keys) - (len(documents) - new)
    if new == len(documents):
        raise InputError(f"{where}: was built with another corpus, of which no text is in {documents.corpus.name}; "
                         "name another, or remove this one to build it again")
    if not RANK:
        log(f"{count(len(documents), 'document')}: {new:,} new, {gone:,} gone; only new ones are encoded")
