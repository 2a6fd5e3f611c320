"""Nearest neighbours by hnswlib's graph."""

from simcse.console import InputError
from simcse.index.exact import Found
from simcse.index.settings import HNSW_EF, HNSW_M, HNSW_MAX_ELEMENTS
from simcse.machine import available_memory

import numpy as np

HNSW_BLOCK = 4  # queries a thread up to which hnswlib searches in one thread alone


class HnswIndex:
    """hnswlib (Malkov and Yashunin 2018) on inner products, which are cosines for L2-normalized embeddings.

    Args:
        m: links a node (hnswlib's M); memory and recall grow with it.
        ef: candidates kept while building, and at least while searching; time and recall grow with it.
        threads: those of a search. Adding takes one, so that the same vectors give the same graph.
        path: where `save` has written an index; None: an empty one.
    """

    build_settings = (HNSW_M, HNSW_MAX_ELEMENTS)
    search_settings = (HNSW_EF,)
    approximate = True

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
