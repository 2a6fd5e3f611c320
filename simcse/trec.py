"""Files of other people's rules: TREC's and BEIR's judgements, and runs."""

import math
from collections.abc import Iterator

from simcse.console import InputError, reported

import numpy as np


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
