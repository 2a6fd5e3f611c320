"""Search by words: BM25 over jieba's words of Chinese, and its fusion with the ranking of embeddings."""

import logging
import os
import time
import unicodedata
from collections.abc import Sequence

from simcse import console
from simcse.files import new_folder, read_json, write_json

import bm25s
import jieba
import numpy as np

Found = tuple[np.ndarray, np.ndarray]  # of every query rows int64 [Q, k] and scores [Q, k], best first
K1, B = 1.5, 0.75
CORPUS_FILE = "corpus.json"  # beside what bm25s writes
jieba.setLogLevel(logging.WARNING)
logging.getLogger("bm25s").setLevel(logging.WARNING)  # else it logs wherever another library has set up logging


def fold(text: str) -> str:
    """A text of one width and one case: Unicode's NFKC, case folded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def words(text: str) -> list[str]:
    """The words of a text, folded, those without a letter or a digit left out."""
    return [word for word in jieba.cut(fold(text)) if any(map(str.isalnum, word))]


class Bm25:
    """BM25 (Robertson et al. 1994, TREC-3) in the form that Lucene has, k1 = 1.5 and b = 0.75.

    A document's score is the sum, over the words of the query, each as often as it is there, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length)); lengths are in words.

    The index is read from `folder`, InputError where that is damaged, or else built, with all words of the documents in
    memory, and kept there; None: it is only built. `corpus` is the SHA-256 of the file that the documents are of, which
    is kept beside it: read for another, it is damaged.
    """

    def __init__(self, documents: Sequence[str], folder: str | None = None, corpus: str | None = None) -> None:
        if folder and os.path.isdir(folder):
            self._index = _read(folder, len(documents), corpus)
            return
        self._index = _build(documents)
        if folder and self._index:
            try:
                with new_folder(folder) as temporary:
                    self._index.save(temporary, show_progress=False)
                    write_json(os.path.join(temporary, CORPUS_FILE), {"corpus": corpus})
            except OSError as error:  # the index may be another user's, or on a disk that cannot be written
                console.warn(f"BM25 is not kept in {folder}: {error.strerror or error}")

    def search(self, queries: Sequence[str], k: int) -> Found:
        """The k documents of the highest scores above 0 of every query: rows int64 and scores float32 [Q, k], best
        first, of equal scores the lower row first; where there are fewer, rows -1 with scores -inf at the end."""
        rows, scores = np.full((len(queries), k), -1, "int64"), np.full((len(queries), k), -np.inf, "float32")
        if not self._index:
            return rows, scores
        with console.progress("BM25: searching", len(queries), "queries") as advance:
            for number, query in enumerate(queries):
                of_all = self._index.get_scores_from_ids(self._index.get_tokens_ids(words(query)))
                best = np.flatnonzero(of_all > 0)
                if k < len(best):
                    best = best[of_all[best] >= np.partition(of_all[best], -k)[-k]]
                best = best[np.argsort(-of_all[best], kind="stable")][:k]
                rows[number, : len(best)], scores[number, : len(best)] = best, of_all[best]
                advance()
        return rows, scores


def _build(documents: Sequence[str]) -> bm25s.BM25 | None:
    """The index of the documents; None: no document has a word."""
    started, vocabulary, ids = time.time(), {"": 0}, []
    with console.progress("BM25", len(documents), "documents") as advance:
        for document in documents:
            ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words(document)])
            advance()
    index = bm25s.BM25(k1=K1, b=B, method="lucene") if any(ids) else None
    if index:
        index.index((ids, vocabulary), show_progress=False)
    console.log(f"BM25 over {len(ids)} documents, {len(vocabulary) - 1} words: {time.time() - started:.1f} s")
    return index


def _read(folder: str, documents: int, corpus: str | None) -> bm25s.BM25:
    """The index that is kept in a folder, of so many documents of a corpus."""
    with console.reported(f"{folder}: damaged", OSError, EOFError, KeyError, ValueError,
                          remedy="; remove this folder to build it again"):
        index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        if index.scores["num_docs"] != documents:
            raise ValueError(f"of {index.scores['num_docs']} documents instead of {documents}")
        if read_json(os.path.join(folder, CORPUS_FILE)).get("corpus", corpus) != corpus:  # earlier versions kept none
            raise ValueError("of another corpus")
        if fold(known := " ".join(index.vocab_dict)) != known:
            raise ValueError("its words differ in width or case, as an earlier version made them")
    console.log(f"using BM25 in {folder}")
    return index


def fuse(dense: Found, lexical: Found, k: int) -> Found:
    """Two rankings of the same queries as one: a document's score is its cosine plus its BM25 score divided by that of
    the query's first (a convex combination; Bruch et al. 2023, arXiv:2210.11934).

    Both are [Q, any], best first, rows of -1 none. A document that is not in a ranking has the last score there, which
    it has at most, or 0 where that is none. The k best are rows int64 and scores float64 [Q, k], of equal scores the
    better rank in `dense` first; where there are fewer, rows -1 with scores -inf at the end.
    """
    highest = np.where(lexical[0][:, :1] >= 0, lexical[1][:, :1], 1.0)
    sides = [side.tolist() for found, points in (dense, (lexical[0], lexical[1] / highest))
             for side in (found, np.where(found >= 0, points, 0.0))]
    rows, scores = np.full((len(dense[0]), k), -1, "int64"), np.full((len(dense[0]), k), -np.inf)
    for number, (near, cosines, matching, shares) in enumerate(zip(*sides)):
        cosine_of, share_of = dict(zip(near, cosines)), dict(zip(matching, shares))
        fused = {row: cosine_of.get(row, cosines[-1]) + share_of.get(row, shares[-1])
                 for row in (*near, *matching) if row >= 0}
        best = sorted(fused, key=fused.__getitem__, reverse=True)[:k]  # stable: equal ones stay in dense order
        rows[number, : len(best)], scores[number, : len(best)] = best, [fused[row] for row in best]
    return rows, scores
