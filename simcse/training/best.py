"""Compare the evaluations of a run, for --save_best and --early_stopping."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simcse.console import InputError, log
from simcse.encoder.weights import CONFIG_FILE, read_record
from simcse.machine import RANK
from simcse.ranks import any_rank, gather_numbers

NO_STEP = -1


@dataclass
class BestEvaluation:
    """The best evaluation of a run so far, and the number of evaluations since.

    It is part of the training state, so that a resumed run continues to compare. The record of model_best may have a
    later one; see `read_best`.

    Attributes:
        step: the step after which it was made; None: no evaluation has been the best yet.
        measures: its measures by name, in percent. The first one decides; a higher one is better. {} where `step` is
            None, and on all ranks but rank 0, which alone measures.
        evaluations_since: the number of evaluations since then; where `step` is None, since the start of the run.
        test_set_digest: SHA-256 of the test set; None: the run does not compare evaluations.
    """

    step: int | None = None
    measures: dict[str, float] = field(default_factory=dict)
    evaluations_since: int = 0
    test_set_digest: str | None = None

    def update(self, step: int, measures: Mapping[str, float]) -> bool:
        """Compare an evaluation with the best one so far, and replace that one if the new one is better.

        All ranks call it together.

        Args:
            step: the step after which the new one was made.
            measures: those of the new one, as in the class; {} also where they are undefined.

        Returns:
            Whether the new one is better, the same on all ranks.
        """
        is_best = any_rank(is_better(measures, self.measures))
        if is_best:
            self.step = step
            self.measures = dict(measures)
            self.evaluations_since = 0
        elif self.step is None or step > self.step:  # a resumed run may repeat steps before the best evaluation
            self.evaluations_since += 1
        return is_best

    def describe(self) -> str:
        """Return the first measure and the step, as in "recall@1=51.0 after step 100"."""
        if self.step is None:
            return "none, since all were undefined"
        name, value = next(iter(self.measures.items()))
        return f"{name}={value} after step {self.step}"


def is_better(measures: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Return whether the first measure is higher than that of the best evaluation so far.

    Undefined measures are never better. Equal ones are not either, so that the earlier of two equal evaluations stays.

    Args:
        measures: by name; {}: they are undefined.
        best: by name; {}: there is no best evaluation yet.
    """
    if not measures:
        return False
    if not best:
        return True
    name = next(iter(measures))
    return measures[name] > best[name]


def digest_run(settings: Mapping[str, Any], test_set_digest: str | None) -> str:
    """Return SHA-256 of the settings of a run and of its test set, in hexadecimal.

    It tells the model_best of a run from those of runs with other settings, not from those of runs that started from
    other weights.

    Args:
        settings: the `values` of its `RunSettings`, which include the digest of the training file.
        test_set_digest: SHA-256 of the test set.
    """
    content = json.dumps([dict(settings), test_set_digest], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def check_best_record(record: Mapping[str, Any], folder: str) -> None:
    """Raise InputError if the record of model_best does not say after which step it was, or with which measures."""
    path = os.path.join(folder, CONFIG_FILE)
    if "step" not in record:
        raise InputError(f"{path}: step: missing")
    measures = record.get("measures")
    if not measures or not all(isinstance(value, float | int) for value in measures.values()):
        raise InputError(f"{path}: measures: expected a number for each name, got {measures!r}")


def read_best(folder: str, run_digest: str, state: BestEvaluation) -> BestEvaluation:
    """Return the best evaluation of a run that is resumed with --save_best: the one in the record of model_best.

    It may be later than the one in the training state, since a run that was killed repeats the steps after its last
    checkpoint. Where model_best is missing or of another run, there is no best evaluation yet. That is so where the run
    had another --save_dir, or no --save_best, and where all its evaluations were undefined, whose number is kept for
    --early_stopping. All ranks call it together.

    Args:
        folder: of model_best; it need not exist.
        run_digest: what `digest_run` returns of the run.
        state: the best evaluation in the training state.

    Raises:
        InputError: see `check_best_record`.
    """
    record = read_record(folder)
    is_of_run = record.get("run_digest") == run_digest
    if is_of_run:
        check_best_record(record, folder)
    step = gather_numbers(record["step"] if is_of_run else NO_STEP)[0]  # only rank 0's disk has to have the folder
    if step == NO_STEP:
        if record and not RANK:
            log(f"{folder} is not of the run that is resumed; the next evaluation replaces it")
        if state.step is None:
            return state
        return BestEvaluation(test_set_digest=state.test_set_digest)
    if step == state.step:
        return state
    return BestEvaluation(step, record.get("measures", {}), test_set_digest=state.test_set_digest)
