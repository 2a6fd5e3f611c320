"""Nearest neighbours by cosine of L2-normalized embeddings: hnswlib's graph, and exact search as the reference."""

from collections.abc import Iterable, Sequence

import numpy as np

from data import InputError


def exact_search(queries: np.ndarray, corpus: np.ndarray, k: int, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar corpus rows of every query, by a blocked matrix product.

    Args:
        queries, corpus: L2-normalized float32 [Q, dim] and [N, dim].
        k: how many; at most N are returned.
        block: queries a matrix product.

    Returns:
        Corpus rows int64 [Q, min(k, N)] and cosines float32 of the same shape, best first; of equal cosines the
        lower row first.
    """
    k = min(k, len(corpus))
    rows, cosines = np.empty((len(queries), k), "int64"), np.empty((len(queries), k), "float32")
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        similarity = queries[part] @ corpus.T
        if k < len(corpus):
            best = np.sort(np.argpartition(-similarity, k - 1, axis=1)[:, :k], axis=1)
        else:
            best = np.broadcast_to(np.arange(k), similarity.shape)
        found = np.take_along_axis(similarity, best, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        rows[part] = np.take_along_axis(best, order, axis=1)
        cosines[part] = np.take_along_axis(found, order, axis=1)
    return rows, cosines


class HnswIndex:
    """hnswlib (Malkov and Yashunin 2018) on inner products, which are cosines for L2-normalized embeddings.

    Args:
        dim: size of the embeddings.
        max_elements: how many embeddings the index can hold.
        m: links a node (hnswlib's M); memory and recall grow with it.
        ef: candidates kept while building and searching; time and recall grow with it.
        threads: 0: all cores.
    """

    def __init__(self, dim: int, max_elements: int, m: int = 100, ef: int = 100, threads: int = 0) -> None:
        import hnswlib

        self.ef = ef
        self._index = hnswlib.Index(space="ip", dim=dim)
        self._index.init_index(max_elements=max_elements, ef_construction=ef, M=m)
        if threads:
            self._index.set_num_threads(threads)

    def __len__(self) -> int:
        return self._index.get_current_count()

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._index.add_items(embeddings, np.arange(len(self), len(self) + len(embeddings)))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `exact_search`, approximately. More neighbours than `ef` or than there are elements are no error.

        Raises:
            InputError: the graph, built with too small an `m`, does not reach k elements from some query.
        """
        k = min(k, len(self))
        ef = max(self.ef, k)
        while True:
            self._index.set_ef(ef)
            try:
                rows, distances = self._index.knn_query(queries, k)
                return rows.astype("int64"), 1.0 - distances
            except RuntimeError:  # hnswlib: fewer than k reached with this ef
                if ef >= len(self):
                    raise InputError(f"--hnsw_m is too small: the index does not reach {k} documents from every query; "
                                     "raise --hnsw_m or --hnsw_ef") from None
                ef = min(2 * ef, len(self))


def recall_at(ranks: np.ndarray, ks: Iterable[int]) -> dict[int, float]:
    """Recall@k in percent, to three digits.

    Args:
        ranks: for every query the rank of its first target, from 0; infinite where it was not recalled.
    """
    return {k: round(100 * float(np.mean(np.asarray(ranks) < k)), 3) for k in ks}


def first_hits(rows: np.ndarray, targets: Sequence[set[int]]) -> np.ndarray:
    """The rank, from 0, of the first of each query's targets in its result [Q, k]; infinite where there is none."""
    return np.array([next((rank for rank, row in enumerate(result) if row in target), np.inf)
                     for result, target in zip(rows.tolist(), targets)])
