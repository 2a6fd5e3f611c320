"""Compute and report the recall of an approximate index against exact search."""

from collections.abc import Callable, Sequence
from typing import Any

from simcse.console import log, warn
from simcse.index.manifest import AnnRecall
from simcse.machine import RANK

import numpy as np

MEASURED = 100  # how many documents, or queries, an index is measured with
MEASURED_K = 10  # how deep it is measured
HALVES = "halves of documents"  # what it is measured with where there may be no queries
POOR = 0.99  # an ANN recall below it is a warning, with advice


def pick_evenly(items: Sequence) -> Any:
    """Return every nth of some documents or embeddings, MEASURED at most, to measure an index with."""
    step = -(-len(items) // MEASURED)
    return items[::step]


def ann_recall(cosines: np.ndarray, exact_cosines: np.ndarray) -> float:
    """Return the fraction of the exact result that an approximate one has.

    A hit counts if its cosine is at least that of the exact k-th, so ties count.

    Args:
        cosines, exact_cosines: [queries, k] of the same queries, best first.
    """
    kth_best = exact_cosines[:, -1:]
    return float(np.mean(cosines >= kth_best - 1e-6))


def measure_recall(search: Callable[[dict[str, Any]], np.ndarray], exact_cosines: np.ndarray, settings: dict[str, Any],
                   deeper_settings: dict[str, Any], kind: str, rows: int) -> AnnRecall:
    """Return the recall@k of a search with its settings, and of one with deeper ones.

    Args:
        search: returns the cosines that a search with some settings finds, [queries, k], best first.
        exact_cosines: those of exact search, [queries, k].
        settings: of the search.
        deeper_settings: those that find more; {}: there are none.
        kind: what the queries are, a plural, for the report.
        rows: of the index.
    """
    queries, k = exact_cosines.shape
    recall = ann_recall(search(settings), exact_cosines)
    deeper_recall = ann_recall(search(deeper_settings), exact_cosines) if deeper_settings else recall
    return AnnRecall(k=k, queries=f"{queries} {kind}", recall=round(recall, 4), settings=dict(settings),
                     deeper_recall=round(deeper_recall, 4), deeper_settings=deeper_settings, rows=rows)


def report_ann_recall(measured: AnnRecall | None, search_settings: dict[str, Any] | None = None,
                      rows: int | None = None, exact: str = "--ann_engine exact",
                      as_flags: Callable[[dict[str, Any]], str] | None = None) -> None:
    """Log how much an index misses; warn and advise if that is much. Only rank 0 does.

    Args:
        measured: None: nothing was measured.
        search_settings: those of the search, if they may be other than the measured ones.
        rows: of the index now, if they may be more or fewer than those that were measured.
        exact: what finds all, for the advice.
        as_flags: returns settings as they are given on the command line; None: each is a flag.
    """
    if RANK or measured is None:
        return
    as_flags = as_flags or engine_flags
    used = measured.settings if search_settings is None else search_settings
    message = (f"ANN recall@{measured.k} against exact search, {measured.queries}: {measured.recall:.4f} "
               f"with {as_flags(measured.settings)}")
    if rows is not None and measured.rows not in (None, rows):
        message += f", measured when it had {measured.rows:,} rows instead of {rows:,}"
    if used not in (measured.settings, measured.deeper_settings):
        log(f"{message}; this search has {as_flags(used)}, with which it was not measured")
        return
    recall = measured.recall
    if used != measured.settings:
        recall = measured.deeper_recall
        message += f"; this search has {as_flags(used)}, which finds {recall:.4f}"
    if recall < POOR:
        warn(message + _advise(measured, used, exact, as_flags))
    else:
        log(message)


def _advise(measured: AnnRecall, used: dict[str, Any], exact: str, as_flags: Callable[[dict[str, Any]], str]) -> str:
    """Return what finds more than a search with the settings `used`, as the end of a message."""
    if measured.deeper_recall <= measured.recall + 0.001:
        advice = f"; {exact} finds all"
        if measured.deeper_settings:
            advice += f", {as_flags(measured.deeper_settings)} does not help"
        return advice
    advice = ""
    if used == measured.settings:
        advice = f"; {as_flags(measured.deeper_settings)} finds {measured.deeper_recall:.4f}"
    if measured.deeper_recall < POOR:
        advice += f"; larger values may find more, {exact} finds all"
    return advice


def engine_flags(settings: dict[str, Any]) -> str:
    """Return settings as they are given on the command line; "its default settings" if there are none."""
    flags = [f"--{name} {value}" for name, value in settings.items()]
    return " ".join(flags) or "its default settings"
