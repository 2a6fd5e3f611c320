"""The documents of a collection of Milvus that was opened without its corpus."""

from collections.abc import Sequence

from simcse.index.manifest import Manifest
from simcse.index.milvus_collection import DOCUMENT, IDS, LINES, PASSAGE, TEXT, Collection
from simcse.index.protocols import NOT_FOUND, Document, Line
from simcse.text.keys import passage_keys

import numpy as np


class CollectionDocuments:
    """The `DocumentStore` of a collection. Its rows and documents are keys.

    Another process may bring the collection up to another corpus between a search and the calls here. What it has
    removed then has no document, or a document no lines, and is in no hit.

    Args:
        collection: has the texts.
        manifest: what it is made of.
    """

    def __init__(self, collection: Collection, manifest: Manifest) -> None:
        self._collection = collection
        self._manifest = manifest
        self.line_count = manifest.lines
        self.row_count = manifest.rows
        self.has_passages = bool(manifest.passages)

    def __len__(self) -> int:
        return self._manifest.documents

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the key of each row's document, int64 of the same shape; NOT_FOUND stays, and stands for a gone row.
        """
        if not self.has_passages:
            return rows
        keys, place = np.unique(rows, return_inverse=True)
        row_of = self._collection.find(keys[keys != NOT_FOUND].tolist(), [DOCUMENT])
        documents = [row_of[key][DOCUMENT] if key in row_of else NOT_FOUND for key in keys.tolist()]
        return np.array(documents, "int64")[place].reshape(rows.shape)

    def rows_of(self, document: int) -> np.ndarray:
        """Return the keys of a document's rows, int64."""
        if not self.has_passages:
            return np.array([document], "int64")
        return np.array(self._collection.keys_of_document(document), "int64")

    def read(self, documents: Sequence[int], max_lines: int | None = None) -> list[Document]:
        """Return some documents by their keys, each with its first `max_lines` lines; their numbers are not known."""
        keys = np.asarray(documents, "int64")
        if self.has_passages:
            keys = passage_keys(keys, np.zeros(len(keys), "int64"))  # of the passages that begin them
        row_of = self._collection.find(keys.tolist(), [TEXT, LINES, IDS])
        read = []
        for key in keys.tolist():
            stored = row_of.get(key, {TEXT: "", LINES: 0, IDS: ""})
            count = stored[LINES] if max_lines is None else min(max_lines, stored[LINES])
            ids = iter(stored[IDS].split("\t") if stored[IDS] else [])
            read.append(Document(stored[TEXT], [Line(None, next(ids, None)) for _ in range(count)]))
        return read

    def passage_texts(self, rows: Sequence[int]) -> list[str]:
        """Return the texts of some passages."""
        row_of = self._collection.find(list(rows), [PASSAGE])
        return [row_of[row][PASSAGE] if row in row_of else "" for row in rows]
