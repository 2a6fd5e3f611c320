"""The rows of a corpus as a collection of Milvus stores them: under the keys of their texts, with lines and ids."""

from collections.abc import Sequence
from typing import Any

from simcse.console import InputError, part, some
from simcse.index.documents import Documents
from simcse.index.key_table import KeyTable
from simcse.index.milvus_collection import DOCUMENT, IDS, KEY, LINES, MAX_BYTES, PASSAGE, TEXT, VECTOR

import numpy as np

BLOCK = 4096  # documents whose texts are read at a time


class CorpusRows:
    """The rows of a corpus, their keys, and what a collection stores of them.

    Args:
        documents: the corpus; a row is one of theirs.
    """

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self._keys = documents.row_keys()
        self._table = KeyTable(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def keys_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the keys of some rows, int64."""
        return self._keys[rows]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the rows that have some keys, int64; NOT_FOUND: none has."""
        return self._table.find(keys)

    def lines_and_ids(self, rows: np.ndarray) -> tuple[list[int], list[str]]:
        """Return the fields LINES and IDS of some rows."""
        documents = self.documents.documents_of(rows)
        begins = self.documents.begin_documents(rows)
        lines = np.where(begins, self.documents.line_counts(documents), 0).tolist()
        ids = [""] * len(rows)
        if self.documents.corpus.has_ids:
            for place in np.flatnonzero(begins).tolist():
                ids[place] = join_ids([line.id for line in self.documents.lines(int(documents[place]))])
        return lines, ids

    def to_store(self, rows: np.ndarray, vectors: np.ndarray) -> list[dict[str, Any]]:
        """Return all fields of some rows, with their vectors, float32 [rows, dim]."""
        documents = self.documents.documents_of(rows)
        begins = self.documents.begin_documents(rows)
        texts = np.full(len(rows), "", object)
        texts[begins] = self.documents[documents[begins]]
        passages = self.documents.passage_texts(rows) if self.documents.has_passages else [""] * len(rows)
        keys = self._keys[rows].tolist()
        document_keys = self.documents.keys[documents].tolist()
        lines, ids = self.lines_and_ids(rows)
        stored = []
        for place in range(len(rows)):
            stored.append({
                KEY: keys[place],
                DOCUMENT: document_keys[place],
                TEXT: texts[place],
                PASSAGE: passages[place],
                LINES: lines[place],
                IDS: ids[place],
                VECTOR: vectors[place],
            })
        return stored

    def check_lengths(self, rows: np.ndarray) -> None:
        """Raise InputError if the text of a row is longer than a field of Milvus can be."""
        documents = np.unique(self.documents.documents_of(rows))
        too_long = []
        for start in range(0, len(documents), BLOCK):
            block = documents[start : start + BLOCK]
            for document, text in zip(block.tolist(), self.documents[block]):
                if len(text.encode()) > MAX_BYTES:
                    too_long.append(self.documents.place(document))
        if too_long:
            raise InputError(f"--corpus_file {some(too_long, 3)}: "
                             f"{part(len(too_long), len(self.documents), 'text', 'are')} "
                             f"longer than Milvus takes, {MAX_BYTES:,} bytes; shorten them, or take another "
                             "--ann_engine")


def join_ids(ids: Sequence[str]) -> str:
    """Return ids with a tab between them, which none has; the last ones are left out if a field cannot hold them."""
    size = 0
    for place, id in enumerate(ids):
        size += len(id.encode()) + 1
        if size > MAX_BYTES:
            return "\t".join(ids[:place])
    return "\t".join(ids)
