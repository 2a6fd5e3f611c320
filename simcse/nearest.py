"""Nearest neighbours by cosine of L2-normalized embeddings: by exact search, the reference, and by hnswlib's graph."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

from simcse.console import InputError, log, warn
from simcse.machine import RANK, available_memory

import numpy as np

# Exact search multiplies so many queries by so many documents at a time, on every core: 16 MB of cosines.
QUERY_BLOCK, CORPUS_BLOCK = 256, 16384
MEASURED = 100  # documents, or queries, that an index is measured with
POOR = 0.99  # ANN recall below which it is said what finds more
HNSW_BLOCK = 4  # queries a thread up to which hnswlib searches in one thread alone
Found = tuple[np.ndarray, np.ndarray]  # of every query rows int64 [Q, k] and their cosines float32 [Q, k], best first


def merge(parts: Iterable[Found], k: int) -> Found:
    """The k best of several results of the same queries, or all where there are fewer; of equal cosines the lower row
    first."""
    rows, cosines = map(np.hstack, zip(*parts))
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def exact_search(queries: np.ndarray, corpus: "np.ndarray | ExactIndex | HnswIndex", k: int) -> Found:
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


class HnswIndex:
    """hnswlib (Malkov and Yashunin 2018) on inner products, which are cosines for L2-normalized embeddings.

    Args:
        m: links a node (hnswlib's M); memory and recall grow with it.
        ef: candidates kept while building, and at least while searching; time and recall grow with it.
        threads: those of a search. Adding takes one, so that the same vectors give the same graph.
        path: where `save` has written an index; None: an empty one.
    """

    def __init__(self, dim: int, max_elements: int, m: int = 32, ef: int = 100, threads: int = 0,
                 path: str | None = None) -> None:
        import hnswlib

        self.ef, self.threads = ef, threads or -1
        self._index = hnswlib.Index(space="ip", dim=dim)
        needed = max_elements * (4 * dim + 8 * m + 60)  # the vector, the links of the lowest level, label and lock
        try:
            if needed > available_memory():
                raise MemoryError
            if not path:
                self._index.init_index(max_elements=max_elements, ef_construction=ef, M=m)
        except (MemoryError, RuntimeError):
            raise InputError(f"the graph of {max_elements:,} documents of {dim} needs {needed / 1e9:.1f} GB of memory, "
                             f"and {available_memory() / 1e9:.1f} are free: share it out among several processes or "
                             "machines, or take --ann_engine milvus") from None
        if path:
            self._index.load_index(path, max_elements)

    def __len__(self) -> int:
        return self._index.get_current_count()

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        rows = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        return np.asarray(self._index.get_items(rows), "float32")

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._index.add_items(embeddings, np.arange(len(self), len(self) + len(embeddings)), 1)

    def search(self, queries: np.ndarray, k: int) -> Found:
        """As `exact_search`, approximately, with at least 2 k candidates; InputError where the graph, built with too
        small an `m`, does not reach k elements from some query."""
        k = min(k, len(self))
        ef = max(self.ef, 2 * k)
        while True:
            self._index.set_ef(ef)
            try:
                rows, distances = self._index.knn_query(queries, k, self.threads)
                return rows.astype("int64"), 1.0 - distances
            except RuntimeError:  # hnswlib: fewer than k reached with this ef
                if ef >= len(self):
                    raise InputError(f"--hnsw_m is too small: the index does not reach {k} documents from every query; "
                                     "raise --hnsw_m or --hnsw_ef") from None
                ef = min(2 * ef, len(self))

    def save(self, path: str) -> None:
        self._index.save_index(path)


def sample(items: Any) -> Any:
    """Every nth of some entries or embeddings, MEASURED at most, to measure an index with."""
    return items[:: -(-len(items) // MEASURED)]


def ann_recall(cosines: np.ndarray, exact_cosines: np.ndarray) -> float:
    """The part of the exact result that an approximate one has, both cosines [Q, k] of the same queries, best first;
    documents of equal cosine stand for each other."""
    return float(np.mean(cosines >= exact_cosines[:, -1:] - 1e-6))


def report(measured: dict | None, ef: int = 0) -> None:
    """Say what `Shards.measure` has found, and, where much is missed, what has been seen to find more; and where the
    search has another `ef`, for which nothing was measured."""
    if RANK or not measured:
        return
    remedy = ""
    if measured["recall"] < POOR:
        helps = measured["deeper_recall"] > measured["recall"] + 0.001
        remedy = (f"; --hnsw_ef {measured['deeper_ef']} finds {measured['deeper_recall']:.4f}" if helps else
                  "; --ann_engine exact finds all, a larger --hnsw_ef does not help")
    (warn if remedy else log)(
        f"ANN recall@{measured['k']} against exact search, {measured['queries']}: {measured['recall']:.4f} "
        f"with --hnsw_ef {measured['hnsw_ef']}{remedy}"
        + (f"; this search has {ef}" if ef not in (0, measured["hnsw_ef"]) else ""))
