"""Exact search by a matrix product: an engine for small corpora, and the reference for the others."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from simcse.index.protocols import NO_SCORE, LocalEngine, SearchResult, merge_results
from simcse.machine import CPU_THREADS

import numpy as np

# A thread multiplies so many queries by so many vectors at a time: 16 MB of cosines.
QUERY_BLOCK = 256
CORPUS_BLOCK = 16384


def exact_search(queries: np.ndarray, vectors: np.ndarray, k: int, threads: int = 0) -> SearchResult:
    """Return the k most similar vectors for each query; of equal cosines the lower row comes first.

    Args:
        queries: float32 [queries, dim], L2-normalized.
        vectors: those that are searched, float32 [vectors, dim], L2-normalized.
        k: how many; all vectors if there are fewer.
        threads: how many blocks of queries are searched at a time; 0: as many as there are cores.
    """
    if not len(queries):
        size = min(k, len(vectors))
        return SearchResult(np.empty((0, size), "int64"), np.empty((0, size), "float32"))
    query_blocks = [queries[start : start + QUERY_BLOCK] for start in range(0, len(queries), QUERY_BLOCK)]
    best = SearchResult(np.empty((len(queries), 0), "int64"), np.empty((len(queries), 0), "float32"))
    with ThreadPoolExecutor(threads or CPU_THREADS) as workers:
        for start in range(0, len(vectors), CORPUS_BLOCK):  # the last bit of a cosine depends on these blocks
            transposed = vectors[start : start + CORPUS_BLOCK].T
            running = [workers.submit(_search_block, block, transposed, k) for block in query_blocks]
            results = [search.result() for search in running]
            rows = np.concatenate([result.rows for result in results]) + start
            scores = np.concatenate([result.scores for result in results])
            best = merge_results([best, SearchResult(rows, scores)], k)
    return best


def _search_block(queries: np.ndarray, transposed: np.ndarray, k: int) -> SearchResult:
    """Return the k most similar columns for each query; unlike other results in the order of the columns.

    Of columns that are as similar as the k-th the lower ones are among the k.

    Args:
        queries: float32 [queries, dim].
        transposed: float32 [dim, columns].
    """
    cosines = queries @ transposed
    size = cosines.shape[1]
    k = min(k, size)
    kth_best = np.partition(cosines, size - k, axis=1)[:, size - k, np.newaxis]
    candidates = cosines >= kth_best
    columns = np.nonzero(candidates)[1]
    if len(columns) > k * len(queries):  # somewhere several are as similar as the k-th
        columns = np.stack([_lowest_best(cosines[query], candidates[query], k) for query in range(len(queries))])
    columns = columns.reshape(len(queries), k)
    return SearchResult(columns, np.take_along_axis(cosines, columns, axis=1))


def _lowest_best(cosines: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """Return the k best columns of one query, in their order; of equal cosines the lower columns.

    Args:
        cosines: float32 [columns].
        candidates: bool [columns], whether a column is as similar as the k-th, or more.
    """
    columns = np.flatnonzero(candidates)
    order = np.argsort(-cosines[columns], kind="stable")
    return np.sort(columns[order[:k]])


class NearestCosines:
    """The k highest cosines of some queries among vectors that come in pieces and are not kept.

    Args:
        queries: float32 [queries, dim], L2-normalized.
        k: how many.

    Attributes:
        cosines: float32 [queries, k], best first; NO_SCORE where there are fewer vectors.
    """

    def __init__(self, queries: np.ndarray, k: int) -> None:
        self.queries = queries
        self.k = k
        self.cosines = np.full((len(queries), k), NO_SCORE, "float32")

    def add(self, vectors: np.ndarray) -> None:
        """Look among more vectors, float32 [n, dim]."""
        self._keep_best([self.cosines, self.queries @ vectors.T])

    def gather(self) -> None:
        """Look among the vectors of all ranks, which call it together."""
        from simcse.ranks import gather_arrays

        self._keep_best(gather_arrays(self.cosines))

    def _keep_best(self, parts: Sequence[np.ndarray]) -> None:
        """Keep the highest of some cosines, float32 [queries, any] each."""
        candidates = np.hstack(parts)
        best = np.partition(candidates, -self.k, axis=1)[:, -self.k :]
        self.cosines = np.sort(best, axis=1)[:, ::-1]


class ExactEngine(LocalEngine):
    """All vectors in one array, searched by `exact_search`."""

    description = "a matrix product, for up to some 100,000 documents"
    queries_per_thread = QUERY_BLOCK

    def __init__(self, dimension: int, capacity: int, settings: dict[str, Any]) -> None:
        super().__init__(dimension, capacity, settings)
        self._vectors = np.empty((capacity, dimension), "float32")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, vectors: np.ndarray) -> None:
        """Add vectors, float32 [n, dimension]."""
        self._vectors[self._count : self._count + len(vectors)] = vectors
        self._count += len(vectors)

    def search(self, queries: np.ndarray, k: int, threads: int) -> SearchResult:
        """Return the k most similar vectors of each query; see `exact_search`."""
        return exact_search(queries, self.all_vectors(), k, threads)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some rows, float32 [rows, dimension]."""
        return self._vectors[rows]

    def all_vectors(self) -> np.ndarray:
        """Return all vectors, float32 [len(self), dimension]."""
        return self._vectors[: self._count]

    def save(self, path: str) -> None:
        """Write the array in numpy's format."""
        with open(path, "wb") as file:
            np.save(file, self.all_vectors())

    def load(self, path: str) -> None:
        """Read the array that `save` has written."""
        self._vectors = np.load(path)
        self._count = len(self._vectors)
