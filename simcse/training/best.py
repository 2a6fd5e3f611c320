"""The best evaluation of a run so far, for --save_best and --early_stopping."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simcse.console import log
from simcse.encoder.weights import read_record
from simcse.machine import RANK
from simcse.ranks import any_rank, gather_numbers

NO_STEP = -1


@dataclass
class BestEvaluation:
    """The best evaluation of a run so far, and how many have come since.

    It is part of the training state, so that a resumed run goes on with it. Where a model_best was saved after that
    state, its record has a later one; see `read_best`.

    Attributes:
        step: after which it was made; None: there is none yet.
        measures: what it measured, by name, in percent; the first one counts, and the higher the better. {} where there
            is none yet, and on other ranks than the first.
        evaluations_since: evaluations since then, or since the start of the run.
        test_set: digest of the test set; None: evaluations are not compared.
    """

    step: int | None = None
    measures: dict[str, float] = field(default_factory=dict)
    evaluations_since: int = 0
    test_set: str | None = None

    def compare(self, step: int, measures: Mapping[str, float]) -> bool:
        """Return whether an evaluation is better than the best so far, whose place it takes then.

        All ranks call it together, and get the same answer.

        Args:
            step: after which it was made.
            measures: see the class; {} also where they are undefined.
        """
        is_best = any_rank(is_better(measures, self.measures))
        if is_best:
            self.step = step
            self.measures = dict(measures)
            self.evaluations_since = 0
        elif self.step is None or step > self.step:  # a resumed run may repeat the steps before its best one
            self.evaluations_since += 1
        return is_best

    def describe(self) -> str:
        """Return the measure that counts and its step, as in "recall@1=51.0 after step 100"."""
        if self.step is None:
            return "none, since all were undefined"
        name, value = next(iter(self.measures.items()))
        return f"{name}={value} after step {self.step}"


def is_better(measures: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Return whether the first of the measures is higher than that of the best evaluation so far.

    Undefined measures are never better, and an equal one is not either: of two equal evaluations the first one stays.

    Args:
        measures: by name; {}: they are undefined.
        best: by name; {}: there is none yet.
    """
    if not measures:
        return False
    if not best:
        return True
    name = next(iter(measures))
    return measures[name] > best[name]


def digest_run(settings: Mapping[str, Any], test_set: str | None) -> str:
    """Return SHA-256 of the settings of a run and of its test set, in hexadecimal.

    Two runs that share it have the same weights after the same step, as far as the device is deterministic, unless they
    start from different weights.

    Args:
        settings: the `values` of its `RunSettings`, to which the digest of the training file belongs.
        test_set: digest of the test set.
    """
    content = json.dumps([dict(settings), test_set], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def read_best(folder: str, run: str, state: BestEvaluation) -> BestEvaluation:
    """Return the best evaluation of a run that is resumed: the one that model_best has in its record.

    It may be later than the training state, since a run that was killed repeats the steps after its last checkpoint.
    Where model_best is not of this run, there is no best evaluation yet, and the next one takes its place: the run had
    another --save_dir, or no --save_best. All ranks call it together.

    Args:
        folder: of model_best; it need not exist.
        run: the `digest_run` of the run.
        state: the best evaluation in the training state.
    """
    record = read_record(folder)
    is_of_run = record.get("run") == run
    step = gather_numbers(record["step"] if is_of_run else NO_STEP)[0]  # only the disk of rank 0 need have it
    if step == NO_STEP:
        if record and not RANK:
            log(f"{folder} is not of the run that is resumed; the next evaluation takes its place")
        return BestEvaluation(test_set=state.test_set)
    if step == state.step:
        return state
    return BestEvaluation(step, record.get("measures", {}), test_set=state.test_set)
