"""Search by words: BM25 over jieba's words of Chinese, and its fusion with the ranking of embeddings."""

import logging
import os
import time
from collections.abc import Sequence

from simcse import console
from simcse.files import new_folder, read_json, write_json
from simcse.index.hits import Ranking
from simcse.index.protocols import NO_SCORE, NOT_FOUND, SearchResult
from simcse.text.words import query_words, words

import bm25s
import numpy as np

K1 = 1.5
B = 0.75
CORPUS_FILE = "corpus.json"  # beside the files of bm25s: the corpus, and the version of `words`
WORDS_VERSION = 2
logging.getLogger("bm25s").setLevel(logging.WARNING)  # else it logs wherever another library has set up logging


class Bm25:
    """BM25 (Robertson et al. 1994, TREC-3) in the form that Lucene has, k1 = 1.5 and b = 0.75.

    A document's score is the sum, over the words of the query, each as often as it is there, of
    ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length)); lengths are in words.

    Args:
        documents: the texts. All of their words are in memory while the index is built.
        folder: where the index is read from, or, if there is none, built and kept; None: it is only built.
        corpus: SHA-256 of the file that the documents are of, kept with the index and compared when it is read.

    Raises:
        InputError: the folder is damaged, or of another corpus.
    """

    def __init__(self, documents: Sequence[str], folder: str | None = None, corpus: str | None = None) -> None:
        if folder and os.path.isdir(folder):
            self._index = _read(folder, len(documents), corpus)
            return
        self._index = _build(documents)
        if folder and self._index:
            _keep(self._index, folder, corpus)

    def search(self, queries: Sequence[str], k: int) -> SearchResult:
        """Return the k documents of the highest scores above 0 for each query, as rows of the documents."""
        rows = np.full((len(queries), k), NOT_FOUND)
        scores = np.full((len(queries), k), NO_SCORE, "float32")
        if not self._index:
            return SearchResult(rows, scores)
        with console.progress("BM25: searching", len(queries), "queries") as advance:
            for number, query in enumerate(queries):
                scores_of_all = self._index.get_scores_from_ids(self._index.get_tokens_ids(query_words(query)))
                best = _best(scores_of_all, k)
                rows[number, : len(best)] = best
                scores[number, : len(best)] = scores_of_all[best]
                advance()
        return SearchResult(rows, scores)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the rows of the k highest scores above 0, best first; of equal scores the lower row first."""
    rows = np.flatnonzero(scores > 0)
    if k < len(rows):
        kth_best = np.partition(scores[rows], -k)[-k]
        rows = rows[scores[rows] >= kth_best]
    order = np.argsort(-scores[rows], kind="stable")
    return rows[order[:k]]


def _build(documents: Sequence[str]) -> bm25s.BM25 | None:
    """Return the index of the documents; None: no document has a word."""
    started = time.time()
    id_of_word = {"": 0}
    ids_of_documents = []
    with console.progress("BM25", len(documents), "documents") as advance:
        for document in documents:
            ids_of_documents.append([id_of_word.setdefault(word, len(id_of_word)) for word in words(document)])
            advance()
    index = None
    if any(ids_of_documents):
        index = bm25s.BM25(k1=K1, b=B, method="lucene")
        index.index((ids_of_documents, id_of_word), show_progress=False)
    vocabulary = console.count(len(id_of_word) - 1, "word")
    console.log(f"BM25 over {console.count(len(documents), 'document')}, {vocabulary}: {time.time() - started:.1f} s")
    return index


def _keep(index: bm25s.BM25, folder: str, corpus: str | None) -> None:
    """Write the index to a folder; warn if that is another user's, or cannot be written."""
    try:
        with new_folder(folder) as temporary:
            index.save(temporary, show_progress=False)
            write_json(os.path.join(temporary, CORPUS_FILE), {"corpus": corpus, "words": WORDS_VERSION})
    except OSError as error:
        console.warn(f"BM25 is not kept in {folder}: {error.strerror or error}")


def _read(folder: str, documents: int, corpus: str | None) -> bm25s.BM25:
    """Return the index in a folder.

    Args:
        documents: how many it must have.
        corpus: SHA-256 of the file that they must be of.
    """
    with console.as_input_error(f"{folder}: damaged", OSError, EOFError, KeyError, ValueError,
                          remedy="; remove this folder to build it again"):
        index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        kept_documents = index.scores["num_docs"]
        if kept_documents != documents:
            raise ValueError(f"of {kept_documents} documents instead of {documents}")
        record = read_json(os.path.join(folder, CORPUS_FILE))
        if record.get("corpus") != corpus:
            raise ValueError("of another corpus")
        if record.get("words") != WORDS_VERSION:
            raise ValueError("an earlier version made it, which had other words")
    console.log(f"using BM25 in {folder}")
    return index


def fuse(dense: Ranking, lexical: SearchResult, k: int) -> Ranking:
    """Return the k best documents of two rankings of the same queries.

    A document's fused score is its cosine plus its BM25 score divided by that of the query's first (a convex
    combination; Bruch et al. 2023, arXiv:2210.11934). A document that is missing from a ranking gets that ranking's
    lowest score, an upper bound of its own, or 0 if the ranking has fewer documents than were asked for. Of equal
    scores the better rank in `dense` comes first.

    Args:
        dense: documents by cosine, [queries, any].
        lexical: documents by BM25, as rows, [queries, any].
        k: how many.

    Returns:
        scores are float64 [queries, k]; rows are those of `dense`.
    """
    queries = len(dense.documents)
    fused = Ranking(np.full((queries, k), NOT_FOUND), np.full((queries, k), NO_SCORE), np.full((queries, k), NOT_FOUND))
    for query in range(queries):
        cosine_of, lowest_cosine = _scores_by_document(dense.documents[query], dense.scores[query])
        highest = lexical.scores[query, 0] if lexical.rows[query, 0] != NOT_FOUND else 1.0
        share_of, lowest_share = _scores_by_document(lexical.rows[query], lexical.scores[query] / highest)
        score_of = {}
        for document in [*cosine_of, *share_of]:
            score_of[document] = cosine_of.get(document, lowest_cosine) + share_of.get(document, lowest_share)
        best = sorted(score_of, key=score_of.__getitem__, reverse=True)[:k]  # stable: equal ones stay in dense order
        row_of = dict(zip(dense.documents[query].tolist(), dense.rows[query].tolist()))
        for rank, document in enumerate(best):
            fused.documents[query, rank] = document
            fused.scores[query, rank] = score_of[document]
            fused.rows[query, rank] = row_of.get(document, NOT_FOUND)
    return fused


def _scores_by_document(documents: np.ndarray, scores: np.ndarray) -> tuple[dict[int, float], float]:
    """Return the score of each document of one ranking, and that of a document which is not in it."""
    found = documents != NOT_FOUND
    score_of = dict(zip(documents[found].tolist(), scores[found].tolist()))
    lowest = float(scores[-1]) if found[-1] else 0.0
    return score_of, lowest
