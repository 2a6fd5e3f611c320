"""From rows of an index to documents: the best passage of each, the lines that have its text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from simcse.console import warn
from simcse.index.exact import Found

import numpy as np


class Hit(NamedTuple):
    """A document that was found: the number of its line and its id are None where they are not known, the passage where
    there are none or words alone have found it."""

    document: str
    line: int | None
    id: str | None
    score: float
    passage: str | None = None


Rows = list[dict[int, int]]  # of every query the row of each entry that was found, where there are passages


def search(index: Any, documents: Any, queries: np.ndarray, k: int) -> tuple[Found, Rows | None]:
    """The k best entries, as `Shards.search` finds rows; of passages, each entry by its best one. `documents` are
    `Entries` or a `MilvusIndex`."""
    k = min(k, len(documents))
    if documents.passages is None:
        return index.search(queries, k), None
    depth, lacking = k, np.arange(len(queries))
    most = min(len(documents.passages), getattr(index, "MOST", len(documents.passages)))  # that the index gives
    entries, cosines, rows = (np.empty((len(queries), k), kind) for kind in ("int64", "float32", "int64"))
    while len(lacking):
        depth = min(2 * depth, most)
        found = index.search(queries[lacking], depth)
        of = np.where(found[0] < 0, -1, documents.passages.documents_of(found[0]))
        entries[lacking], cosines[lacking], rows[lacking] = best_rows(*found, of, k)
        lacking = lacking[(entries[lacking, -1] < 0) & (found[0][:, -1] >= 0)]
        if depth == most:
            break
    if len(lacking) and most < len(documents.passages):
        warn(f"{len(lacking):,} of {len(queries):,} queries have fewer than {k:,} documents: their first {most:,} "
             "passages, more than which Milvus does not give, are of fewer")
    return (entries, cosines), [dict(zip(*both)) for both in zip(entries.tolist(), rows.tolist())]


def expand(found: Found, documents: Any, depths: Sequence[int], distinct: bool = False,
           rows: Rows | None = None) -> list[list[Hit]]:
    """Of every query the documents that were found, best first, at most its depth: each line that has an entry's text,
    or, if `distinct`, the first of them alone. `documents` are `Entries` or a `MilvusIndex`."""
    sides = [side.tolist() for side in found]
    shown = [[entry for entry in entries[:depth] if entry >= 0] for entries, depth in zip(sides[0], depths)]
    wanted = sorted({entry for entries in shown for entry in entries})
    of_entry = dict(zip(wanted, documents.take(wanted, 1 if distinct else max(depths))))
    of_row: dict[int | None, str] = {}
    if rows:
        needed = sorted({own[entry] for entries, own in zip(shown, rows) for entry in entries if entry in own})
        of_row = dict(zip(needed, documents.passages[np.array(needed, "int64")]))
    return [[Hit(of_entry[entry][0], *line, score, of_row.get(own.get(entry)))
             for entry, score in zip(entries, scores) for line in of_entry[entry][1]][:depth]
            for entries, scores, depth, own in zip(shown, sides[1], depths, rows or [{}] * len(shown))]


def best_rows(rows: np.ndarray, cosines: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    """Of every query the k best documents, each by the best of its rows: documents and rows int64, cosines float32
    [Q, k]. All three are [Q, any], best first, -1 for none; where there are fewer, the last are -1 of cosine -inf."""
    order = np.argsort(documents, axis=1, kind="stable")
    sorted_ones = np.take_along_axis(documents, order, axis=1)
    is_first = np.empty(documents.shape, bool)
    np.put_along_axis(is_first, order, np.diff(sorted_ones, axis=1, prepend=-1) > 0, axis=1)
    places = np.cumsum(is_first, axis=1) - 1
    query, column = np.nonzero(is_first & (places < k))
    best = [np.full((len(rows), k), -1), np.full((len(rows), k), -np.inf, "float32"), np.full((len(rows), k), -1)]
    for to, given in zip(best, (documents, cosines, rows)):
        to[query, places[query, column]] = given[query, column]
    return best[0], best[1], best[2]
