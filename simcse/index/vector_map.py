"""Map the rows of an index to its vectors: rows that are the same to the encoder share one."""

import os
from typing import NamedTuple

from simcse.index.protocols import NO_SCORE, NOT_FOUND, SearchResult

import numpy as np

MAP_FILE = "row_map.npy"
VECTOR_KEYS_FILE = "vector_keys.npy"


class VectorMap(NamedTuple):
    """The vectors of an index, and the rows that each stands for.

    Different texts can be the same to the encoder: it reads only the first tokens, and depending on its tokenizer
    neither case nor spacing. They get one vector. A vector for each would break an HNSW graph, as copies of one text
    would (see `Documents`).

    Vectors are numbered in the order of their first rows.

    Attributes:
        keys: int64 [vectors]; see `EncoderInput.keys`.
        vector_of_row: int32 [rows].
        rows: int32 [rows], those of vector v are rows[starts[v] : starts[v + 1]], rising.
        starts: int32 [vectors + 1].
    """

    keys: np.ndarray
    vector_of_row: np.ndarray
    rows: np.ndarray
    starts: np.ndarray

    @classmethod
    def of_keys(cls, key_of_row: np.ndarray) -> "VectorMap":
        """Return the map of rows, int64 [rows], of which those with the same key share a vector."""
        # np.unique numbers vectors by their keys; further down they are numbered by their first rows.
        keys, first_rows, vector_by_key_of_row, counts = np.unique(
            key_of_row, return_index=True, return_inverse=True, return_counts=True)
        by_first_row = np.argsort(first_rows)
        number_of_vector = np.empty(len(keys), "int32")
        number_of_vector[by_first_row] = np.arange(len(keys))
        vector_of_row = number_of_vector[vector_by_key_of_row]
        rows = np.argsort(vector_of_row, kind="stable").astype("int32")
        starts = np.append(0, np.cumsum(counts[by_first_row])).astype("int32")
        return cls(keys[by_first_row], vector_of_row, rows, starts)

    @classmethod
    def of_own_vectors(cls, rows: int) -> "VectorMap":
        """Return the identity map of so many rows."""
        return cls.of_keys(np.arange(rows))

    @classmethod
    def load(cls, folder: str, rows: int) -> "VectorMap":
        """Return the map that `save` has written; its files are mapped into memory.

        Args:
            rows: how many rows it has.
        """
        saved = np.load(os.path.join(folder, MAP_FILE), mmap_mode="r")
        keys = np.load(os.path.join(folder, VECTOR_KEYS_FILE), mmap_mode="r")
        vector_of_row, rows_of_vectors, starts = np.split(saved, [rows, 2 * rows])
        return cls(keys, vector_of_row, rows_of_vectors, starts)

    def save(self, folder: str) -> None:
        """Write the map to a folder."""
        np.save(os.path.join(folder, MAP_FILE), np.concatenate([self.vector_of_row, self.rows, self.starts]))
        np.save(os.path.join(folder, VECTOR_KEYS_FILE), self.keys)

    @property
    def vector_count(self) -> int:
        return len(self.keys)

    def first_rows(self, vectors: slice | np.ndarray) -> np.ndarray:
        """Return the first row of each of some vectors, int64."""
        return self.rows[self.starts[:-1][vectors]].astype("int64")

    def vector_ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of each row's vector, int64 of the same shape; NOT_FOUND stays."""
        return np.where(rows == NOT_FOUND, NOT_FOUND, self.vector_of_row[rows].astype("int64"))

    def expand(self, result: SearchResult, k: int) -> SearchResult:
        """Return the k best rows of each query for its best vectors; the rows of a vector follow each other.

        Args:
            result: its `rows` are numbers of vectors, [queries, any].
            k: how many.
        """
        if self.vector_count == len(self.vector_of_row):  # each row has its own vector, of the same number
            return SearchResult(result.rows[:, :k], result.scores[:, :k])
        is_found = result.rows != NOT_FOUND
        vectors = np.where(is_found, result.rows, 0)
        counts = np.where(is_found, self.starts[vectors + 1] - self.starts[vectors], 0).clip(max=k)
        columns = np.cumsum(counts, axis=1) - counts  # where the rows of each vector begin in the result
        counts = np.minimum(counts, (k - columns).clip(min=0))

        # From here on there is an element for each row of the result: its query, its vector, its place in the vector.
        counts = counts.ravel()
        query = np.repeat(np.indices(vectors.shape)[0].ravel(), counts)
        vector = np.repeat(vectors.ravel(), counts)
        place_in_vector = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)

        column = np.repeat(columns.ravel(), counts) + place_in_vector
        rows = np.full((len(vectors), k), NOT_FOUND)
        rows[query, column] = self.rows[self.starts[vector] + place_in_vector]
        scores = np.full((len(vectors), k), NO_SCORE, "float32")
        scores[query, column] = np.repeat(result.scores.ravel(), counts)
        return SearchResult(rows, scores)
