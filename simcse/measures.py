"""How good a recall result is, query by query and on average, and whether two results differ by more than chance. A
query's `ranks` are those of its targets, from 0, a number each; infinite where a target was not recalled."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat, zip_longest

import numpy as np

RECALL_KS = (1, 5, 10, 20, 50)


Targets = Sequence[tuple[float, float]]  # rank and grade of each


def success(targets: Targets, k: int) -> float:
    """1 if any target is among the first k documents, else 0; the mean is Recall@k as PaddleNLP counts it."""
    return float(any(rank < k for rank, _ in targets))


def recall(targets: Targets, k: int) -> float:
    """The part of the targets that is among the first k documents; 0 where there is none."""
    return sum(rank < k for rank, _ in targets) / max(1, len(targets))


def reciprocal_rank(targets: Targets, k: float = math.inf) -> float:
    """1 / (1 + rank of the first target), 0 if none is among the first k documents; the mean is MRR (Voorhees 1999,
    TREC-8 question answering track)."""
    first = min((rank for rank, _ in targets), default=math.inf)
    return 1 / (1 + first) if first < k else 0.0


def ndcg(targets: Targets, k: int = 10) -> float:
    """DCG@k over that of the best order, 0 where there are no targets; DCG@k is the sum of grade / log2(2 + rank) over
    the targets of rank < k (Järvelin and Kekäläinen 2002, with the gains and the discount that trec_eval takes)."""
    grades = sorted((grade for _, grade in targets), reverse=True)[:k]
    best = sum(grade / math.log2(2 + rank) for rank, grade in enumerate(grades))
    return sum(grade / math.log2(2 + rank) for rank, grade in targets if rank < k) / (best or 1)


Metrics = dict[str, dict[str, Callable[[Targets], float]]]
# What --metrics may ask for, and the figures that each gives, of queries with targets of grade 1.
METRICS: Metrics = {
    "recall": {f"recall@{k}": partial(success, k=k) for k in RECALL_KS},
    "mrr": {"mrr": reciprocal_rank},
    "ndcg": {"ndcg@10": ndcg},
}
# The same of judgements, where recall is what others call it.
JUDGED_METRICS: Metrics = {
    "recall": {f"recall@{k}": partial(recall, k=k) for k in RECALL_KS},
    "success": {f"success@{k}": partial(success, k=k) for k in RECALL_KS},
    "mrr": {"mrr@10": partial(reciprocal_rank, k=10)},
    "ndcg": {"ndcg@10": ndcg},
}


def per_query(ranks: Iterable[Iterable[float]], metrics: Iterable[str], depth: float = math.inf,
              grades: Iterable[Iterable[float]] = (), known: Metrics = METRICS) -> dict[str, np.ndarray]:
    """Every figure of the `metrics` named, of every query: by name float64 [Q], from 0 to 1. Targets from rank `depth`
    on count as not recalled; `grades` are the targets' where they are not 1."""
    looked_at = [[(rank if rank < depth else math.inf, grade) for rank, grade in zip(each, of_each or repeat(1.0))]
                 for each, of_each in zip_longest(ranks, grades)]
    return {name: np.array([measure(each) for each in looked_at])
            for metric in metrics for name, measure in known[metric].items()}


def percent(values: np.ndarray) -> float:
    """The mean in percent, to three digits."""
    return round(100 * float(np.mean(values)), 3)


def first_hits(rows: np.ndarray, targets: Sequence[set[int]]) -> np.ndarray:
    """The rank, from 0, of the first of each query's targets in its result [Q, k]; infinite where there is none."""
    return np.array([next((rank for rank, row in enumerate(result) if row in target), np.inf)
                     for result, target in zip(rows.tolist(), targets)])


def paired_bootstrap(differences: np.ndarray, resamples: int = 10_000) -> np.ndarray:
    """95 % percentile intervals, float64 [2, M], of the mean differences of two systems, float64 [Q, M] for each query
    and measure; queries are drawn with replacement (Efron and Tibshirani 1993, chapter 13; Koehn 2004)."""
    # Queries of the same differences are drawn together, how many of them by a multinomial: there are few kinds.
    kinds, counts = np.unique(differences, axis=0, return_counts=True)
    random, queries = np.random.default_rng(0), len(differences)
    block = max(1, 1_000_000 // len(kinds))
    means = [random.multinomial(queries, counts / queries, size=min(block, resamples - start)) @ kinds / queries
             for start in range(0, resamples, block)]
    return np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
