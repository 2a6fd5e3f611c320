"""What `run.py index` measures of an approximate index, on every side; with numpy alone."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import side

GOALS = (0.95, 0.99)  # of recall@K
K = 10
UNITS = {"build": "s", "size": "MB", **{f"recall@{K} {goal}": "queries/s" for goal in GOALS}, "one query": "ms"}
EFFORTS = [round(10 * 2 ** (step / 4)) for step in range(34)]  # candidates of a search, or lists: from 10 to 3,044


class Tried(NamedTuple):
    """A search that was tried: with what effort, and the recall@K it has."""

    effort: int
    recall: float


Search = Callable[[np.ndarray, int], np.ndarray]  # queries [Q, dim] and an effort -> rows [Q, K]


def load(folder: str) -> list[np.ndarray]:
    """Return vectors float32 [N, dim], queries float32 [Q, dim], and the rows that exact search finds, int64 [Q, K]."""
    return [np.load(f"{folder}/{name}.npy") for name in ("vectors", "queries", "exact")]


def measure(build: Callable[[], None], save: Callable[[str], None], search: Search, queries: np.ndarray,
            exact: np.ndarray) -> dict[str, float]:
    """Measure an index, and return a value for each of UNITS.

    Args:
        build: builds it.
        save: writes it to a path; the size is that of the files written.
        search: queries it.
        queries: float32 [Q, dim].
        exact: int64 [Q, K], the rows that exact search finds.

    Returns:
        See `measure_search` for the speeds and the time of one query.
    """
    values = {"build": side.seconds_of(build)}
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/index")
        values["size"] = size_of(folder) / 2**20
    return values | measure_search(search, queries, exact)


def measure_search(search: Search, queries: np.ndarray, exact: np.ndarray, max_effort: int = EFFORTS[-1]
                   ) -> dict[str, float]:
    """Measure the searches of an index; see `measure`.

    Args:
        max_effort: the largest effort that finds more than a smaller one.

    Returns:
        For each goal the queries/s, NaN where none of EFFORTS reaches it. The seconds are interpolated between the last
        effort that misses the goal and the first that reaches it, because a step changes the speed by up to a fifth.
        "one query" is the time of one of the first 200, asked one by one, with the last effort that was tried.
    """
    values = {}
    efforts = iter([effort for effort in EFFORTS if effort <= max_effort])
    reached = Tried(EFFORTS[0], recall=0.0)  # stands for "none"
    for goal in GOALS:
        while reached.recall < goal:
            effort = next(efforts, None)
            if effort is None:
                break
            missed, reached = reached, Tried(effort, recall_of(search(queries, effort), exact))
        if reached.recall >= goal:
            recalls = [missed.recall, reached.recall]
            seconds = [median_time([partial(search, queries, tried.effort)] * 3) for tried in (missed, reached)]
            values[f"recall@{K} {goal}"] = len(queries) / float(np.interp(goal, recalls, seconds))
        else:
            values[f"recall@{K} {goal}"] = np.nan
    single = [partial(search, query, reached.effort) for query in queries[:200, None]]
    values["one query"] = 1000 * median_time(single)
    return values


def recall_of(rows: np.ndarray, exact: np.ndarray) -> float:
    """Return the fraction of the exact rows that was found."""
    return float(np.mean([len(np.intersect1d(*pair)) / K for pair in zip(rows, exact)]))


def size_of(folder: str) -> int:
    """Return the bytes of all files in a folder and the folders in it."""
    total = 0
    for top, _, names in os.walk(folder):
        total += sum(os.path.getsize(os.path.join(top, name)) for name in names)
    return total


def median_time(calls: list[Callable[[], object]]) -> float:
    """Return the median of the seconds that the calls take."""
    return float(np.median([side.seconds_of(call) for call in calls]))
