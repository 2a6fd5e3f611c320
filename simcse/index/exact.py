"""Exact search by cosine of L2-normalized embeddings, the reference."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np

# Exact search multiplies so many queries by so many documents at a time, on every core: 16 MB of cosines.
QUERY_BLOCK, CORPUS_BLOCK = 256, 16384
Found = tuple[np.ndarray, np.ndarray]  # of every query rows int64 [Q, k] and their cosines float32 [Q, k], best first


def merge(parts: Iterable[Found], k: int) -> Found:
    """The k best of several results of the same queries, or all where there are fewer; of equal cosines the lower row
    first."""
    rows, cosines = map(np.hstack, zip(*parts))
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def exact_search(queries: np.ndarray, corpus: "np.ndarray | ExactIndex", k: int) -> Found:
    """The k most similar corpus rows of every query, by a blocked matrix product.

    Queries [Q, dim] and corpus [N, dim], an array or an index, are float32 and L2-normalized. Rows, int64, and cosines,
    float32, are [Q, min(k, N)], best first; of equal cosines the lower row comes first.
    """
    best = np.empty((len(queries), 0), "int64"), np.empty((len(queries), 0), "float32")
    query_blocks = np.split(queries, range(QUERY_BLOCK, len(queries), QUERY_BLOCK))
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for start in range(0, len(corpus), CORPUS_BLOCK):  # cosines depend on blocks, in their last bit
            block = corpus[start : start + CORPUS_BLOCK]
            found = workers.map(_search_block, query_blocks, repeat(block.T), repeat(k))
            rows, cosines = map(np.concatenate, zip(*found))
            best = merge([best, (rows + start, cosines)], k)
    return best


def _search_block(queries: np.ndarray, transposed: np.ndarray, k: int) -> Found:
    """The k most similar columns of `transposed`, float32 [dim, block], in rising order, and their cosines."""
    cosines = queries @ transposed
    columns = np.sort(np.argpartition(-cosines, min(k, cosines.shape[1]) - 1, axis=1)[:, :k], axis=1)
    return columns, np.take_along_axis(cosines, columns, axis=1)


class ExactIndex:
    """All embeddings in memory, searched by `exact_search`: for small corpora, and as the reference."""

    def __init__(self, path: str | None = None) -> None:
        self._embeddings = np.load(path) if path else np.empty((0, 0), "float32")

    def __len__(self) -> int:
        return len(self._embeddings)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self._embeddings[rows]

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._embeddings = np.concatenate([self._embeddings, embeddings]) if len(self) else embeddings

    def search(self, queries: np.ndarray, k: int) -> Found:
        """See `exact_search`."""
        return exact_search(queries, self, k)

    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            np.save(file, self._embeddings)
