"""What `run.py index` measures of an approximate index, on every side; with numpy alone."""

import os
import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
import side

GOALS, K = (0.95, 0.99), 10
UNITS = {"build": "s", "size": "MB", **{f"recall@{K} {goal}": "queries/s" for goal in GOALS}, "one query": "ms"}
EFFORTS = [round(10 * 2 ** (step / 4)) for step in range(34)]  # candidates of a search, or lists: from 10 to 3,044


def load(folder: str) -> list[np.ndarray]:
    """Vectors [N, dim] and queries [Q, dim], both float32, and the rows that exact search finds, int64 [Q, 10]."""
    return [np.load(f"{folder}/{name}.npy") for name in ("vectors", "queries", "exact")]


def figures(build: Callable[[], None], save: Callable[[str], None], search: Callable[[np.ndarray, int], np.ndarray],
            queries: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """UNITS: the build; what `save` writes at a path; the search of all queries, at the first of EFFORTS that reaches
    the goal, NaN where none does; and of the first 200 one by one, at the last goal's. `search` is given queries
    [Q, dim] and an effort, and finds rows [Q, 10]."""
    result = {"build": side.seconds_of(build)}
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/index")
        result["size"] = sum(os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(folder)
                           for name in names) / 2**20
    efforts, effort, recall = iter(EFFORTS), 0, 0.0
    for goal in GOALS:
        while recall < goal and (effort := next(efforts, 0)):
            recall = np.mean([len(np.intersect1d(*rows)) / K for rows in zip(search(queries, effort), exact)])
        speed = len(queries) / median_time([partial(search, queries, effort)] * 3) if recall >= goal else np.nan
        result[f"recall@{K} {goal}"] = speed
    some = queries[:200, None]
    result["one query"] = 1000 * median_time([partial(search, query, effort or EFFORTS[-1]) for query in some])
    return result


def median_time(works: list[Callable[[], object]]) -> float:
    """Seconds that one of the works takes."""
    return float(np.median([side.seconds_of(work) for work in works]))
