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


class TestSet(NamedTuple):
    """What an index is measured with.

    Attributes:
        vectors: float32 [N, dim].
        queries: float32 [Q, dim].
        exact: the rows that exact search finds, int64 [Q, K].
    """

    vectors: np.ndarray
    queries: np.ndarray
    exact: np.ndarray


def load(folder: str) -> TestSet:
    """Return the test set that `ours.vectors` has written to a folder."""
    return TestSet(*(np.load(f"{folder}/{name}.npy") for name in TestSet._fields))


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
        max_effort: the largest effort that makes sense, such as the number of clusters.

    Returns:
        For each goal the queries/s, and the milliseconds of one of the first 200 queries, asked one by one, at the
        highest goal. The seconds are interpolated between the last effort that misses a goal and the first that reaches
        it, because a step changes the speed by up to a fifth. NaN where no effort reaches the goal.
    """
    tried: list[Tried] = []
    for effort in [*(effort for effort in EFFORTS if effort < max_effort), max_effort]:
        if tried and tried[-1].recall >= GOALS[-1]:
            break
        tried.append(Tried(effort, recall_of(search(queries, effort), exact)))

    def seconds_of_batch(effort: int) -> float:
        return median_time([partial(search, queries, effort)] * 3)

    def seconds_of_one(effort: int) -> float:
        return median_time([partial(search, query, effort) for query in queries[:200, None]])

    values = {f"recall@{K} {goal}": len(queries) / seconds_at(goal, tried, seconds_of_batch) for goal in GOALS}
    values["one query"] = 1000 * seconds_at(GOALS[-1], tried, seconds_of_one)
    return values


def seconds_at(goal: float, tried: list[Tried], seconds_of: Callable[[int], float]) -> float:
    """Return the seconds of a search that has a recall, between the two efforts around it; NaN if none reaches it.

    Args:
        goal: the recall.
        tried: by effort.
        seconds_of: measures a search with an effort.
    """
    reaching = [place for place, trial in enumerate(tried) if trial.recall >= goal]
    if not reaching:
        return np.nan
    if reaching[0] == 0:
        return seconds_of(tried[0].effort)
    around = tried[reaching[0] - 1 : reaching[0] + 1]
    return float(np.interp(goal, [trial.recall for trial in around], [seconds_of(trial.effort) for trial in around]))


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
