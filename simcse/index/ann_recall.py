"""How many of the exact nearest neighbours an approximate index finds: measuring it, and saying it."""

from collections.abc import Callable, Sequence
from typing import Any

from simcse.console import log, warn
from simcse.index.manifest import AnnRecall
from simcse.machine import RANK

import numpy as np

MEASURED = 100  # how many documents, or queries, an index is measured with
MEASURED_K = 10  # how deep it is measured
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


def report_ann_recall(measured: AnnRecall | None, search_settings: dict[str, Any] | None = None,
                      exact: str = "--ann_engine exact",
                      as_flags: Callable[[dict[str, Any]], str] | None = None) -> None:
    """Log how much an index misses; warn and advise if that is much. Only rank 0 does.

    Args:
        measured: None: nothing was measured.
        search_settings: those of the search, if they may be other than the measured ones.
        exact: what finds all, for the advice.
        as_flags: returns settings as they are given on the command line; None: each is a flag.
    """
    as_flags = as_flags or _as_flags
    if RANK or measured is None:
        return
    message = (f"ANN recall@{measured.k} against exact search, {measured.queries}: {measured.recall:.4f} "
               f"with {as_flags(measured.settings)}")
    is_deeper = search_settings == measured.deeper_settings
    is_poor = (measured.deeper_recall if is_deeper else measured.recall) < POOR
    is_deeper_better = measured.deeper_recall > measured.recall + 0.001
    if is_poor and is_deeper_better and not is_deeper:
        message += f"; {as_flags(measured.deeper_settings)} finds {measured.deeper_recall:.4f}"
    elif is_poor:
        message += f"; {exact} finds all"
        if measured.deeper_settings and not is_deeper_better:
            message += f", {as_flags(measured.deeper_settings)} does not help"
    if search_settings is not None and search_settings != measured.settings:
        message += f"; this search has {as_flags(search_settings)}"
        if is_deeper:
            message += f", which finds {measured.deeper_recall:.4f}"
    if is_poor:
        warn(message)
    else:
        log(message)


def _as_flags(settings: dict[str, Any]) -> str:
    """Return settings as they are given on the command line; "its default settings" if there are none."""
    flags = [f"--{name} {value}" for name, value in settings.items()]
    return " ".join(flags) or "its default settings"
