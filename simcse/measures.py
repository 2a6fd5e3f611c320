"""How good a recall result is, query by query and on average, and whether two results differ by more than chance. A
query's `ranks` are those of its targets, from 0, a number each; infinite where a target was not recalled."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat, zip_longest

from simcse.console import InputError, reported

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


def _lines(path: str, flag: str) -> Iterator[tuple[int, str]]:
    with reported(f"{flag} {path}: not UTF-8", UnicodeDecodeError), open(path, encoding="utf-8-sig") as file:
        yield from enumerate(file, 1)


def read_judgements(path: str, flag: str) -> dict[str, dict[str, int]]:
    """Grades by query id and document id, of a file as TREC has them (query id, 0, document id, grade) or BEIR (query
    id, document id, grade, below a header), between white space. InputError: a line is neither, or contradicts an
    earlier one."""
    grades: dict[str, dict[str, int]] = {}
    for number, line in _lines(path, flag):
        fields = line.split()
        if not fields or (number == 1 and fields[-1] == "score"):
            continue
        try:
            query, *_, document, grade = fields
            if len(fields) not in (3, 4) or grades.setdefault(query, {}).setdefault(document, int(grade)) != int(grade):
                raise ValueError
        except ValueError:
            twice = len(fields) in (3, 4) and fields[-2] in grades.get(fields[0], {})
            raise InputError(f"{flag} {path}:{number}: " + (
                f"document {fields[-2]} of query {fields[0]} has another grade on an earlier line" if twice else
                "needed: query id, 0, document id and a whole number, as TREC has them, or without the 0, as BEIR "
                "has")) from None
    if not grades:
        raise InputError(f"{flag} {path}: the file holds no judgement")
    return grades


def read_run(path: str, flag: str) -> dict[str, dict[str, float]]:
    """Scores by query id and document id, of a run as TREC has them: query id, Q0, document id, rank, score, tag.
    InputError: a line is none, or a query has a document twice."""
    run: dict[str, dict[str, float]] = {}
    for number, line in _lines(path, flag):
        if not (fields := line.split()):
            continue
        try:
            query, _, document, _, score, _ = fields
            if not math.isfinite(float(score)):
                raise ValueError
        except ValueError:
            raise InputError(f"{flag} {path}:{number}: needed: query id, Q0, document id, rank, score and tag, as "
                             "recall.py --format trec writes them") from None
        if document in run.setdefault(query, {}):
            raise InputError(f"{flag} {path}:{number}: query {query} has document {document} twice")
        run[query][document] = float(score)
    if not run:
        raise InputError(f"{flag} {path}: the file holds no line")
    return run


def ranking(scores: dict[str, float], metric: str) -> list[str]:
    """Document ids, best first, in the order that the tools have which others take for a metric: MS MARCO's for "mrr",
    with the first id first where scores are equal; trec_eval's for the rest, with the last first, of scores as float32.
    Neither looks at the ranks of a run."""
    if metric == "mrr":
        return sorted(scores, key=lambda document: (-scores[document], document))
    return sorted(scores, key=lambda document: (np.float32(scores[document]), document), reverse=True)
