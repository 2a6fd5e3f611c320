"""How good a recall result is, query by query and on average, and whether two results differ by more than chance.

A metric is a name in METRICS or JUDGED_METRICS, such as "recall"; its formulas are named "recall@1", "recall@5" and so
on. A target is a document that answers a query. Ranks count from 0 everywhere; the rank of a target that was not
recalled is infinite.

To add a metric, write its formula and an entry in METRICS, in JUDGED_METRICS or in both: evaluate.py reads --metrics,
its help text, the printed values and the comparison off them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple

from simcse.console import InputError, as_input_error

import numpy as np

RECALL_KS = (1, 5, 10, 20, 50)

Targets = Sequence[tuple[float, float]]  # of one query: the rank and the grade of each target
Formula = Callable[[Targets], float]


# ----------------------------------------------------------------------------------------------------------- formulas
def success(targets: Targets, k: int) -> float:
    """Return 1 if any target is among the first k documents, else 0.

    The mean is success@k. PaddleNLP calls it Recall@k.
    """
    return float(any(rank < k for rank, _ in targets))


def recall(targets: Targets, k: int) -> float:
    """Return the fraction of the targets that is among the first k documents; 0 where there is no target."""
    if not targets:
        return 0.0
    return sum(rank < k for rank, _ in targets) / len(targets)


def reciprocal_rank(targets: Targets, k: float = math.inf) -> float:
    """Return 1 / (1 + rank of the first target), 0 if none is among the first k documents.

    The mean is MRR (Voorhees 1999, TREC-8 question answering track).
    """
    first = min((rank for rank, _ in targets), default=math.inf)
    return 1 / (1 + first) if first < k else 0.0


def ndcg(targets: Targets, k: int = 10) -> float:
    """Return DCG@k divided by the DCG@k of the best order, 0 where there is no target.

    DCG@k is the sum of grade / log2(2 + rank) over the targets of rank < k (Järvelin and Kekäläinen 2002, with the
    gains and the discount of trec_eval).
    """
    best_grades = sorted((grade for _, grade in targets), reverse=True)[:k]
    best = sum(grade / math.log2(2 + rank) for rank, grade in enumerate(best_grades))
    if not best:
        return 0.0
    return sum(grade / math.log2(2 + rank) for rank, grade in targets if rank < k) / best


# What --metrics takes without --qrels: all targets have grade 1.
METRICS: dict[str, dict[str, Formula]] = {
    # Not the formula `recall`: PaddleNLP calls success@k Recall@k, and the results stay comparable.
    "recall": {f"recall@{k}": partial(success, k=k) for k in RECALL_KS},
    "mrr": {"mrr": reciprocal_rank},
    "ndcg": {"ndcg@10": ndcg},
}
# What --metrics takes with --qrels: names and formulas are those of trec_eval.
JUDGED_METRICS: dict[str, dict[str, Formula]] = {
    "recall": {f"recall@{k}": partial(recall, k=k) for k in RECALL_KS},
    "success": {f"success@{k}": partial(success, k=k) for k in RECALL_KS},
    "mrr": {"mrr@10": partial(reciprocal_rank, k=10)},
    "ndcg": {"ndcg@10": ndcg},
}


# -------------------------------------------------------------------------------------------------- values of queries
def measure_queries(ranks: Iterable[Iterable[float]], metrics: Iterable[str], depth: float = math.inf,
                    grades: Iterable[Iterable[float]] | None = None,
                    table: dict[str, dict[str, Formula]] = METRICS) -> dict[str, np.ndarray]:
    """Compute metrics of every query.

    Args:
        ranks: of each query, the ranks of its targets.
        metrics: names in `table`.
        depth: targets from this rank on count as not recalled.
        grades: of each query, the grades of its targets; None: all are 1.
        table: METRICS or JUDGED_METRICS.

    Returns:
        By the name of a formula, float64 [Q] in [0, 1].
    """
    if grades is None:
        grades = repeat(repeat(1.0))
    queries: list[Targets] = []
    for ranks_of_query, grades_of_query in zip(ranks, grades):
        within_depth = [rank if rank < depth else math.inf for rank in ranks_of_query]
        queries.append(list(zip(within_depth, grades_of_query)))
    values = {}
    for metric in metrics:
        for name, formula in table[metric].items():
            values[name] = np.array([formula(targets) for targets in queries])
    return values


def mean_percent(values: np.ndarray) -> float:
    """Return the mean of values of queries, as a percentage with three decimals."""
    return percent(np.mean(values))


def percent(value: float) -> float:
    """Return a value as a percentage with three decimals."""
    return round(100 * float(value), 3)


def rank_first_targets(rows: np.ndarray, targets: Sequence[set[int]]) -> np.ndarray:
    """Return the rank of each query's first target.

    Args:
        rows: integers [Q, k], the documents that were recalled, best first.
        targets: of each query, the documents that count as hits.

    Returns:
        float64 [Q]; infinite where no target was recalled.
    """
    ranks = np.full(len(targets), np.inf)
    for query, (recalled, wanted) in enumerate(zip(rows.tolist(), targets)):
        for rank, row in enumerate(recalled):
            if row in wanted:
                ranks[query] = rank
                break
    return ranks


def paired_bootstrap(differences: np.ndarray, resamples: int = 10_000) -> np.ndarray:
    """Return 95 % percentile intervals of the mean differences of two systems.

    The queries are drawn with replacement (Efron and Tibshirani 1993, chapter 13; Koehn 2004).

    Args:
        differences: float64 [Q, M], of each query and formula.
        resamples: how often Q queries are drawn.

    Returns:
        float64 [2, M], lower and upper ends.
    """
    # Many queries have equal differences, so a resample only has to say how often it has each distinct row of them.
    # These counts have a multinomial distribution, which is drawn from at once.
    distinct_rows, row_counts = np.unique(differences, axis=0, return_counts=True)
    random = np.random.default_rng(0)
    queries = len(differences)
    block = max(1, 1_000_000 // len(distinct_rows))  # resamples at a time, for the sake of memory
    means = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn_counts = random.multinomial(queries, row_counts / queries, size=size)  # int64 [size, distinct rows]
        means.append(drawn_counts @ distinct_rows / queries)
    return np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)


# ------------------------------------------------------------------------------------------------ judgements and runs
def read_judgements(path: str, flag: str) -> dict[str, dict[str, int]]:
    """Read a file of judgements, as TREC or BEIR has them, with white space between the fields.

    TREC's lines are query id, 0, document id, grade; BEIR's are query id, document id, grade, below a header.

    Args:
        path: the file.
        flag: the flag that names it, for error messages.

    Returns:
        Grades by query id and document id.

    Raises:
        InputError: a line is neither of the two, or contradicts an earlier one.
    """
    grades: dict[str, dict[str, int]] = {}
    for line in _read_lines(path, flag):
        if line.number == 1 and line.fields[-1] == "score":  # BEIR's header
            continue
        try:
            query, document, grade = _parse_judgement(line.fields)
        except ValueError:
            raise InputError(f"{line.place}: expected query id, 0, document id and an integer (TREC), or the same "
                             "without the 0 (BEIR)") from None
        grades_of_query = grades.setdefault(query, {})
        if grades_of_query.setdefault(document, grade) != grade:
            raise InputError(f"{line.place}: document {document} of query {query} has another grade on an earlier line")
    if not grades:
        raise InputError(f"{flag} {path}: no judgement in the file")
    return grades


def read_run(path: str, flag: str) -> dict[str, dict[str, float]]:
    """Read a run as TREC has it: query id, Q0, document id, rank, score, tag.

    Args:
        path: the file.
        flag: the flag that names it, for error messages.

    Returns:
        Scores by query id and document id.

    Raises:
        InputError: a line has other fields, or a query has a document twice.
    """
    run: dict[str, dict[str, float]] = {}
    for line in _read_lines(path, flag):
        try:
            query, document, score = _parse_scored(line.fields)
        except ValueError:
            raise InputError(f"{line.place}: expected query id, Q0, document id, rank, score and tag, as recall.py "
                             "--format trec writes them") from None
        scores = run.setdefault(query, {})
        if document in scores:
            raise InputError(f"{line.place}: query {query} has document {document} twice")
        scores[document] = score
    if not run:
        raise InputError(f"{flag} {path}: the file is empty")
    return run


class _Line(NamedTuple):
    """A line of judgements or of a run.

    Attributes:
        number: from 1.
        place: flag, path and number, for error messages.
        fields: the words between white space, at least one.
    """

    number: int
    place: str
    fields: list[str]


def _read_lines(path: str, flag: str) -> Iterator[_Line]:
    """Yield the lines of a file that are not blank."""
    with open(path, "rb") as file:
        for number, content in enumerate(file, 1):
            place = f"{flag} {path}:{number}"
            with as_input_error(f"{place}: not UTF-8; decompress or convert the file", UnicodeDecodeError):
                fields = content.decode("utf-8-sig").split()
            if fields:
                yield _Line(number, place, fields)


def _parse_judgement(fields: list[str]) -> tuple[str, str, int]:
    """Return query id, document id and grade of a line of TREC or BEIR.

    Raises:
        ValueError: there are other fields.
    """
    if len(fields) not in (3, 4):
        raise ValueError(fields)
    return fields[0], fields[-2], int(fields[-1])


def _parse_scored(fields: list[str]) -> tuple[str, str, float]:
    """Return query id, document id and score of a line of a run.

    Raises:
        ValueError: there are other fields, or the score is NaN or Inf.
    """
    query, _, document, _, text, _ = fields  # raises ValueError unless there are six
    score = float(text)
    if not math.isfinite(score):
        raise ValueError(text)
    return query, document, score


def rank_documents(scores: dict[str, float], metric: str) -> list[str]:
    """Return document ids in the order of their scores, best first; the ranks that a run states do not count.

    Equal scores are ordered as by the usual tool for the metric. For "mrr" that is MS MARCO's: the alphabetically first
    id comes first. For the others it is trec_eval: it compares scores as float32, and the last id comes first.
    """
    if metric == "mrr":
        return sorted(scores, key=lambda document: (-scores[document], document))
    return sorted(scores, key=lambda document: (np.float32(scores[document]), document), reverse=True)
