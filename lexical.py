"""Search by words: BM25 over jieba's words of Chinese, and its fusion with the ranking of embeddings."""

import logging
import time
from collections.abc import Sequence

import bm25s
import jieba
import numpy as np

import console
from ann_util import Found

K1, B = 1.5, 0.75
RRF_K = 60  # Cormack, Clarke and Buettcher 2009 found it best, and little to depend on it
jieba.setLogLevel(logging.WARNING)
logging.getLogger("bm25s").setLevel(logging.WARNING)  # else it logs wherever another library has set up logging


def words(text: str) -> list[str]:
    """The words of a text in lower case, those without a letter or a digit left out."""
    return [word for word in jieba.cut(text.lower()) if any(map(str.isalnum, word))]


class Bm25:
    """BM25 (Robertson et al. 1994, TREC-3) in the form that Lucene has, k1 = 1.5 and b = 0.75.

    A document's score is the sum, over the words of the query, each as often as it is there, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length)); lengths are in words.

    Args:
        documents: the corpus, numbered from 0; all its words are held in memory while the index is built.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        started, vocabulary, ids = time.time(), {"": 0}, []
        with console.progress("BM25", len(documents), "documents") as advance:
            for document in documents:
                ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(document)])
                advance()
        self._index = bm25s.BM25(k1=K1, b=B, method="lucene") if any(ids) else None  # None: no document has a word
        if self._index:
            self._index.index((ids, vocabulary), show_progress=False)
        console.log(f"BM25 over {len(ids)} documents, {len(vocabulary) - 1} words: {time.time() - started:.1f} s")

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k documents of the highest scores above 0 of every query.

        Returns:
            Rows int64 [Q, k] and scores float32 [Q, k], best first, of equal scores the lower row first; where there
            are fewer, rows -1 with scores -inf at the end.
        """
        rows, scores = np.full((len(queries), k), -1, "int64"), np.full((len(queries), k), -np.inf, "float32")
        if not self._index:
            return rows, scores
        with console.progress("BM25: searching", len(queries), "queries") as advance:
            for number, query in enumerate(queries):
                of_all = self._index.get_scores_from_ids(self._index.get_tokens_ids(words(query)))
                best = _best(of_all, k)
                rows[number, : len(best)], scores[number, : len(best)] = best, of_all[best]
                advance()
        return rows, scores


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """The rows of the k highest of the scores [N] that are above 0, best first, of equal ones the lower row first."""
    rows = np.flatnonzero(scores > 0)
    if k < len(rows):
        rows = rows[scores[rows] >= np.partition(scores[rows], -k)[-k]]
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


def fuse(dense: Found, lexical: Found, k: int, weight: float = 1.0) -> Found:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009, SIGIR) of two rankings of the same queries.

    A document's score is 1 / (60 + rank) in the one plus weight / (60 + rank) in the other, ranks from 1, and 0 for a
    ranking that it is not in.

    Args:
        dense, lexical: [Q, any], best first; rows of -1 are none.
        k: documents wanted.
        weight: of the second ranking.

    Returns:
        Rows int64 and scores float64 [Q, k], best first, of equal scores the better rank in `dense` first; where there
        are fewer, rows -1 with scores -inf at the end.
    """
    rows, scores = np.full((len(dense[0]), k), -1, "int64"), np.full((len(dense[0]), k), -np.inf)
    for number, (near, matching) in enumerate(zip(dense[0].tolist(), lexical[0].tolist())):
        fused = {row: 1 / (RRF_K + rank) for rank, row in enumerate(near, 1) if row >= 0}
        for rank, row in enumerate(matching, 1):
            if row >= 0:
                fused[row] = fused.get(row, 0.0) + weight / (RRF_K + rank)
        best = sorted(fused, key=fused.__getitem__, reverse=True)[:k]  # stable: equal ones stay in dense order
        rows[number, : len(best)], scores[number, : len(best)] = best, [fused[row] for row in best]
    return rows, scores
