"""From a search of an index to hits: the best passage of each document, and the lines that have its text."""

from collections.abc import Sequence
from typing import NamedTuple

from simcse.console import part, warn
from simcse.index.protocols import NO_SCORE, NOT_FOUND, Document, DocumentStore, SearchResult, VectorIndex

import numpy as np

FUSION_DEPTH = 100  # documents of each of two rankings that are fused, or --recall_num if that is more


class Hit(NamedTuple):
    """A line of the corpus that a query found.

    Attributes:
        document: its text.
        line: its number in the corpus' file, from 1; None: not known.
        id: its id; None: the corpus has none.
        score: the cosine, or the fused score.
        passage: the best passage of the document; None: there are no passages, or words alone found the document.
    """

    document: str
    line: int | None
    id: str | None
    score: float
    passage: str | None = None


class Ranking(NamedTuple):
    """The best documents for each query, best first.

    Attributes:
        documents: int64 [queries, k]; NOT_FOUND where a query has fewer.
        scores: float [queries, k]; NO_SCORE there.
        rows: int64 [queries, k], the row by which each document was found; NOT_FOUND where words alone found it.
    """

    documents: np.ndarray
    scores: np.ndarray
    rows: np.ndarray


def search(index: VectorIndex, store: DocumentStore, queries: np.ndarray, k: int) -> Ranking:
    """Return the k best documents for each query, a document of passages by its best one.

    Args:
        index: holds the vectors.
        store: maps its rows to documents.
        queries: float32 [queries, dim], L2-normalized.
        k: how many documents; all if there are fewer.
    """
    k = min(k, len(store))
    if store.has_passages:
        ranking = _search_passages(index, store, queries, k)
    else:
        result = index.search(queries, k)
        ranking = Ranking(result.rows, result.scores, result.rows)
    cosines = ranking.scores.clip(-1, 1)  # rounding of two unit vectors may go beyond 1
    return ranking._replace(scores=np.where(ranking.documents == NOT_FOUND, NO_SCORE, cosines))


def _search_passages(index: VectorIndex, store: DocumentStore, queries: np.ndarray, k: int) -> Ranking:
    """Search deeper and deeper, until the passages found are of k documents."""
    ranking = _empty_ranking(len(queries), k)
    most = store.row_count if index.max_k is None else min(store.row_count, index.max_k)
    depth = k
    unfinished = np.arange(len(queries))
    while len(unfinished):
        depth = min(2 * depth, most)
        result = index.search(queries[unfinished], depth)
        best = best_rows(result, store.documents_of(result.rows), k)
        for column, found in zip(ranking, best):
            column[unfinished] = found  # in place, in `ranking`
        has_fewer = best.documents[:, -1] == NOT_FOUND
        has_more_rows = result.rows[:, -1] != NOT_FOUND
        unfinished = unfinished[has_fewer & has_more_rows]
        if depth == most:
            break
    if len(unfinished) and most < store.row_count:
        warn(f"{part(len(unfinished), len(queries), 'query', 'have')} fewer than {k:,} documents: the first {most:,} "
             "passages, more than which Milvus does not give, are of fewer")
    return ranking


def best_rows(result: SearchResult, documents: np.ndarray, k: int) -> Ranking:
    """Return the k best documents of each query, each by the best of its rows.

    Args:
        result: rows and scores [queries, any], best first.
        documents: int64 [queries, any], the document of each row; NOT_FOUND for none.
    """
    is_best = _are_first(documents)
    rank = np.cumsum(is_best, axis=1) - 1  # how many documents of the query come before this one
    query, column = np.nonzero(is_best & (rank < k))
    rank = rank[query, column]
    ranking = _empty_ranking(len(documents), k)
    ranking.documents[query, rank] = documents[query, column]
    ranking.scores[query, rank] = result.scores[query, column]
    ranking.rows[query, rank] = result.rows[query, column]
    return ranking


def _are_first(documents: np.ndarray) -> np.ndarray:
    """Return whether each document has not been in the columns before, bool [queries, any]; False for NOT_FOUND.

    Args:
        documents: int64 [queries, any].
    """
    order = np.argsort(documents, axis=1, kind="stable")  # the columns of a document stay in their order
    by_document = np.take_along_axis(documents, order, axis=1)
    is_other_than_before = np.diff(by_document, axis=1, prepend=NOT_FOUND) > 0
    are_first = np.empty(documents.shape, bool)
    np.put_along_axis(are_first, order, is_other_than_before, axis=1)
    return are_first


def _empty_ranking(queries: int, k: int) -> Ranking:
    return Ranking(np.full((queries, k), NOT_FOUND), np.full((queries, k), NO_SCORE, "float32"),
                   np.full((queries, k), NOT_FOUND))


def hits_of(ranking: Ranking, store: DocumentStore, depths: Sequence[int], distinct: bool = False) -> list[list[Hit]]:
    """Return the hits of each query, best first.

    Args:
        ranking: the documents of each query.
        store: has their texts and lines.
        depths: how many hits each query gets at most.
        distinct: give each text once, not once for every line that has it.
    """
    wanted_documents = set()
    wanted_rows = set()
    for documents, rows, depth in zip(ranking.documents.tolist(), ranking.rows.tolist(), depths):
        wanted_documents.update(documents[:depth])
        wanted_rows.update(rows[:depth])
    max_lines = 1 if distinct else max(depths, default=0)
    document_of = _read_documents(store, wanted_documents - {NOT_FOUND}, max_lines)
    passage_of = _read_passages(store, wanted_rows - {NOT_FOUND})
    return [_hits_of_query(documents, scores, rows, depth, document_of, passage_of)
            for documents, scores, rows, depth in zip(*(column.tolist() for column in ranking), depths)]


def _read_documents(store: DocumentStore, documents: set[int], max_lines: int) -> dict[int, Document]:
    numbers = sorted(documents)
    return dict(zip(numbers, store.read(numbers, max_lines)))


def _read_passages(store: DocumentStore, rows: set[int]) -> dict[int, str]:
    if not store.has_passages or not rows:
        return {}
    numbers = sorted(rows)
    return dict(zip(numbers, store.passage_texts(numbers)))


def _hits_of_query(documents: list[int], scores: list[float], rows: list[int], depth: int,
                   document_of: dict[int, Document], passage_of: dict[int, str]) -> list[Hit]:
    """Return at most `depth` hits of one query; a document has one for each of its lines that was read."""
    hits: list[Hit] = []
    for number, score, row in zip(documents, scores, rows):
        if number == NOT_FOUND or len(hits) >= depth:
            break
        document = document_of[number]
        for line in document.lines[: depth - len(hits)]:
            hits.append(Hit(document.text, line.number, line.id, score, passage_of.get(row)))
    return hits
