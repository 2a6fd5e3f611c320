"""Nearest neighbours by cosine of L2-normalized embeddings: hnswlib's graph, and exact search as the reference.

Both indexes have `add(embeddings)`, `search(queries, k)`, `blocks()`, `save(path)` and `load(path)`.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data import InputError

# Exact search multiplies so many queries by so many documents at a time: 64 MB of cosines.
QUERY_BLOCK, CORPUS_BLOCK = 1024, 16384


def exact_search(queries: np.ndarray, corpus: np.ndarray | Iterable[np.ndarray],
                 k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar corpus rows of every query, by a blocked matrix product.

    Args:
        queries: L2-normalized float32 [Q, dim].
        corpus: likewise [N, dim], whole or as blocks one after the other.
        k: how many; at most N are returned.

    Returns:
        Corpus rows int64 [Q, min(k, N)] and cosines float32 of the same shape, best first; of equal cosines the
        lower row first.
    """
    rows, cosines, seen = np.empty((len(queries), 0), "int64"), np.empty((len(queries), 0), "float32"), 0
    for block in _blocks(corpus) if isinstance(corpus, np.ndarray) else corpus:
        found = [_best(queries[start : start + QUERY_BLOCK] @ block.T, k)
                 for start in range(0, len(queries), QUERY_BLOCK)]
        new_rows, new_cosines = (np.concatenate(part) for part in zip(*found))
        rows, cosines = np.hstack([rows, new_rows + seen]), np.hstack([cosines, new_cosines])
        # Rows of earlier blocks come first, so a stable sort keeps the lower row first.
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        rows, cosines = np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)
        seen += len(block)
    return rows, cosines


def _best(similarity: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the k largest values of every row, in rising order of column, and those values."""
    if k >= similarity.shape[1]:
        return np.broadcast_to(np.arange(similarity.shape[1]), similarity.shape), similarity
    columns = np.sort(np.argpartition(-similarity, k - 1, axis=1)[:, :k], axis=1)
    return columns, np.take_along_axis(similarity, columns, axis=1)


def _blocks(corpus: np.ndarray) -> Iterator[np.ndarray]:
    return (corpus[start : start + CORPUS_BLOCK] for start in range(0, len(corpus), CORPUS_BLOCK))


class ExactIndex:
    """All embeddings in memory, searched by `exact_search`: for small corpora, and as the reference."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._blocks))

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._blocks += _blocks(embeddings)

    def blocks(self) -> Iterable[np.ndarray]:
        """The embeddings in the order in which they were added, float32 [n, dim] at a time."""
        return self._blocks

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `exact_search`."""
        return exact_search(queries, self._blocks, k)

    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            np.save(file, np.concatenate(self._blocks))

    def load(self, path: str) -> None:
        self._blocks = list(_blocks(np.load(path)))


class HnswIndex:
    """hnswlib (Malkov and Yashunin 2018) on inner products, which are cosines for L2-normalized embeddings.

    Args:
        dim: size of the embeddings.
        max_elements: how many embeddings the index can hold.
        m: links a node (hnswlib's M); memory and recall grow with it.
        ef: candidates kept while building, and at least while searching; time and recall grow with it.
        threads: 0: all cores.
    """

    def __init__(self, dim: int, max_elements: int, m: int = 32, ef: int = 100, threads: int = 0) -> None:
        import hnswlib

        self.ef, self.max_elements, self.threads = ef, max_elements, threads or -1
        self._index = hnswlib.Index(space="ip", dim=dim)
        self._index.init_index(max_elements=max_elements, ef_construction=ef, M=m)

    def __len__(self) -> int:
        return self._index.get_current_count()

    def add(self, embeddings: np.ndarray) -> None:
        """Add float32 [n, dim]; their rows are numbered on from those before."""
        self._index.add_items(embeddings, np.arange(len(self), len(self) + len(embeddings)), self.threads)

    def blocks(self) -> Iterator[np.ndarray]:
        """The embeddings in the order in which they were added, float32 [n, dim] at a time."""
        for start in range(0, len(self), CORPUS_BLOCK):
            rows = np.arange(start, min(start + CORPUS_BLOCK, len(self)))
            yield np.asarray(self._index.get_items(rows), "float32")

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `exact_search`, approximately, with at least 4 k candidates, which cost little beside the building.

        Raises:
            InputError: the graph, built with too small an `m`, does not reach k elements from some query.
        """
        k = min(k, len(self))
        ef = max(self.ef, 4 * k)
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

    def load(self, path: str) -> None:
        index = type(self._index)(space="ip", dim=self._index.dim)  # a failed load into one in use ends in a crash
        index.load_index(path, self.max_elements)
        self._index = index


def ann_recall(cosines: np.ndarray, exact_cosines: np.ndarray) -> float:
    """The part of the exact result that an approximate one has; documents of equal cosine stand for each other.

    Args:
        cosines, exact_cosines: [Q, k] of the same queries, best first.
    """
    return float(np.mean(cosines >= exact_cosines[:, -1:] - 1e-6))


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
