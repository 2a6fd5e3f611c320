"""How good a recall result is, query by query and on average, and whether two results differ by more than chance. A
query's `ranks` are those of its targets, from 0, a number each; infinite where a target was not recalled."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

RECALL_KS = (1, 5, 10, 20, 50)


def hit(ranks: Sequence[float], k: int) -> float:
    """1 if any target is among the first k documents, else 0; the mean is Recall@k as PaddleNLP counts it."""
    return float(min(ranks) < k)


def reciprocal_rank(ranks: Sequence[float]) -> float:
    """1 / (1 + rank of the first target), 0 if none was recalled; the mean is MRR (Voorhees 1999, TREC-8 question
    answering track)."""
    return 1 / (1 + min(ranks))


def ndcg(ranks: Sequence[float], k: int = 10) -> float:
    """DCG@k over that of the best order; DCG@k is the sum of 1 / log2(2 + rank) over the targets of rank < k (Järvelin
    and Kekäläinen 2002, with binary gains and the discount that trec_eval and scikit-learn take)."""
    best = sum(1 / math.log2(2 + rank) for rank in range(min(k, len(ranks))))
    return sum(1 / math.log2(2 + rank) for rank in ranks if rank < k) / best


# What --metrics may ask for, and the figures that each gives.
METRICS: dict[str, dict[str, Callable[[Sequence[float]], float]]] = {
    "recall": {f"recall@{k}": partial(hit, k=k) for k in RECALL_KS},
    "mrr": {"mrr": reciprocal_rank},
    "ndcg": {"ndcg@10": ndcg},
}


def per_query(ranks: Iterable[Iterable[float]], metrics: Iterable[str],
              depth: float = math.inf) -> dict[str, np.ndarray]:
    """Every figure of the `metrics` named, of every query: by name float64 [Q], from 0 to 1. Targets from rank `depth`
    on count as not recalled."""
    looked_at = [[rank if rank < depth else math.inf for rank in each] for each in ranks]
    return {name: np.array([measure(each) for each in looked_at])
            for metric in metrics for name, measure in METRICS[metric].items()}


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
