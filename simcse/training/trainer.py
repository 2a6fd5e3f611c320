"""Run a training: set up device and ranks, update weights, save and resume checkpoints, log, and stop on signals.

The loops over the steps are `run_steps` of train.py and of scripts/pretrain.py. They decide when to save, log and stop,
and call a `Trainer` for it.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from simcse import console
from simcse.console import InputError, log, warn
from simcse.device import set_device, set_gpu_precision
from simcse.encoder.paddle_patches import train_faster_on_cpu
from simcse.encoder.weights import add_to_record, new_checkpoint_folder
from simcse.files import file_digest, name_output, new_folder
from simcse.machine import RANK, RANKS, TRAIN_PRECISIONS
from simcse.ranks import all_equal, any_rank, join_ranks, wait_for_ranks
from simcse.training.best import BestEvaluation, digest_run, read_best
from simcse.training.checkpoints import best_path, checkpoint_path, prepare_save_dir, remove_old
from simcse.training.gradients import BatchLoss
from simcse.training.log import TrainingLog
from simcse.training.optimization import Optimization
from simcse.training.state import PROCESSES, TRAINING_FILE, Progress, RunSettings, restore_state, write_state
from simcse.training.stopping import Stopped, StopSignal

import numpy as np
import paddle
from paddle import nn

LOG_STEPS = 10  # steps between log lines
CHECK_STEPS = 10  # steps between checks of the loss where a check has to wait for it
MOST_LINES = 100  # lines of a batch that an error message lists
REMEDY = "A lower --learning_rate, --max_grad_norm 1 or --warmup_proportion 0.1 may help"


class Diverged(Exception):
    """The loss, or weights, contain NaN or Inf. The rank that detected it has already reported it on stderr."""


def run_training(args: argparse.Namespace, train: Callable[[], None]) -> None:
    """Call `train` on the device asked for, and end the process with the exit code of the run: 0; 1 where it has
    diverged; 128 + the signal that has stopped it."""
    set_device(args.device, args.cpu_threads)
    if args.device == "gpu":
        set_gpu_precision(args.precision)  # refuses a precision that the GPU does not have before anything takes time
    started = time.time()
    random.seed(args.seed)
    np.random.seed(args.seed)
    paddle.seed(args.seed)
    code = 0
    try:
        train()
    except Diverged:
        code = 1
        if not RANK:
            warn(REMEDY)
    except Stopped as stopped:
        code = 128 + stopped.signal
    if not RANK:
        log(f"training took {time.time() - started:.1f} s")
    raise SystemExit(code)


def check_one_precision(precision: str) -> None:
    """Raise InputError where ranks train in different precisions; their gradients could not be added up."""
    if not all_equal(TRAIN_PRECISIONS.index(precision)):
        raise InputError(f"--precision: this process trains in {precision} and another one does not; give the same "
                         "--precision to all")


class Trainer:
    """The state of a run and what each step does with it.

    Args:
        args: flags, as `flags.resolve_training` returns them.
        model: the network to train; with --resume, that of the checkpoint.
        texts: the training file, a `TextFile`.
        steps_per_epoch: steps of an epoch.
        write_model: writes the network's files into a folder.
        test_set_digest: SHA-256 of the test set; None: evaluations are not compared.

    Attributes:
        network: the model, or the DataParallel that holds it, which exchanges gradients between ranks.
        step: steps that are done.
        total_steps: steps of the run.
        last_saved_step: the step of the newest checkpoint in --save_dir; None: there is none.
        checked_step: the last one whose loss was checked.
        finite_step: the last one after which all weights were found to be finite, so that a step that is both evaluated
            and saved is checked once; None: there is none.
        optimization: optimizer, schedule and loss scaler.
        settings: what a resumed run has to have in common with this one.
        stop_signal: notes SIGINT and SIGTERM.
        evaluated_step: the last one after which this process evaluated the weights; None: there is none.
        best: the best evaluation so far.
        log: writes the log of the run.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Layer, texts: Any, steps_per_epoch: int,
                 write_model: Callable[[str], None], test_set_digest: str | None = None) -> None:
        join_ranks()
        check_one_precision(args.precision)
        if not RANK:
            parameters = sum(parameter.size for parameter in model.parameters())
            prepare_save_dir(args.save_dir, needed=3 * 4 * parameters)  # weights and two moments of each, in float32
        wait_for_ranks()
        if args.device == "cpu":
            train_faster_on_cpu(model)
        self.args = args
        self.model = model
        self.texts = texts
        self.write_model = write_model
        self.network = paddle.DataParallel(model) if RANKS > 1 else model  # gives all ranks the weights of rank 0
        self.step = 0
        self.total_steps = steps_per_epoch * args.epochs
        self.optimization = Optimization(args, model, self.total_steps)
        values = {TRAINING_FILE: file_digest(texts.path), PROCESSES: RANKS}
        for name in args.shared_defaults:
            values[name] = getattr(args, name)
        self.settings = RunSettings(values, defaults=args.shared_defaults)
        self.last_saved_step: int | None = None
        self.evaluated_step: int | None = None
        self.best = BestEvaluation(test_set_digest=test_set_digest)
        if args.resume:
            self._resume(args.resume)
        self.checked_step = self.step
        self.finite_step: int | None = None
        self.stop_signal = StopSignal()
        self.stop_signal.listen()
        self.log = TrainingLog(args.visualdl_dir, step=self.step, total_steps=self.total_steps,
                               steps_per_epoch=steps_per_epoch)

    def _resume(self, folder: str) -> None:
        """Restore the state of the run that left a checkpoint folder."""
        progress = restore_state(folder, self.model, self.optimization, self.settings)
        self.step = progress.step
        if progress.best.test_set_digest == self.best.test_set_digest:  # only measures of one test set are comparable
            self.best = progress.best
        message = f"step {self.step:,} of {self.total_steps:,}"
        if self.step == self.total_steps:
            message = "all steps of the run are done"
        log(f"resuming from {folder}: {message}")
        is_saved = os.path.abspath(folder) == os.path.abspath(checkpoint_path(self.args.save_dir, self.step))
        if any_rank(not is_saved):  # another --save_dir, which gets a checkpoint of its own
            return
        self.last_saved_step = self.step
        if not RANK:
            remove_old(self.args.save_dir, self.step, self.args.keep_checkpoints)  # a kill may have come before this

    def start_step(self) -> None:
        """Put the network into training mode, and seed dropout: it is a function of seed, rank and step, so that a
        resumed run has what an unbroken one has."""
        self.model.train()
        paddle.seed(((self.args.seed + RANK) * 1_000_003 + self.step) % 2**31)

    def scale_loss(self, loss: paddle.Tensor) -> paddle.Tensor:
        """Return the loss scaled for fp16; in other precisions as it is."""
        return self.optimization.scaler.scale(loss)

    def update(self, loss: paddle.Tensor, batch: Any, check_loss: bool) -> None:
        """Apply the gradients of a batch, after a check of its loss.

        Args:
            loss: a scalar.
            batch: has the `rows` of its texts, for the error message.
            check_loss: always check the loss of this step. On one CPU process every step is checked anyway; on a GPU or
                several ranks, where reading the loss blocks, every CHECK_STEPS steps and the last.

        Raises:
            Diverged: the loss is not finite on some rank. The weights are left as they were, and have been saved, if
                they are finite.
        """
        check_is_cheap = self.args.device == "cpu" and RANKS == 1
        step = self.step + 1
        if check_loss or check_is_cheap or step % CHECK_STEPS == 0 or step == self.total_steps:
            self._save_and_raise_if_diverged(float(loss), batch)
        self.optimization.step()
        self.step = step

    def _save_and_raise_if_diverged(self, loss: float, batch: Any) -> None:
        """Save the weights, if they are finite, and raise Diverged, where the loss is not finite on some rank."""
        is_finite = math.isfinite(loss)
        if not is_finite:
            warn(self._describe_loss(loss, batch))
        if any_rank(not is_finite):
            self.save()
            raise Diverged
        self.checked_step = self.step + 1

    def _describe_loss(self, loss: float, batch: Any) -> str:
        lines = sorted(self.texts.line_number(row) for row in batch.rows)
        listed = console.some([str(line) for line in lines], MOST_LINES)
        message = (f"{console.PROGRAM}: error: the loss of step {self.step + 1} is {loss} "
                   f"(batch: lines {listed} of --train_set_file)")
        if self.checked_step < self.step:
            message += (f"; losses from step {self.checked_step + 1} on were not checked, so that an earlier batch may "
                        "be the cause")
        return message

    def check_weights(self, skipped: str) -> None:
        """Report weights that are NaN or Inf, and raise Diverged; all ranks call it together.

        Args:
            skipped: what is not done with such weights, for the message.
        """
        if self.finite_step == self.step:
            return
        is_finite = all(bool(paddle.isfinite(parameter).all()) for parameter in self.model.parameters())
        if not any_rank(not is_finite):
            self.finite_step = self.step
            return
        if not RANK:
            warn(f"{console.PROGRAM}: error: after step {self.step} weights contain NaN or Inf; {skipped}")
        raise Diverged

    def save(self) -> None:
        """Write the checkpoint of this step, unless it is written: on rank 0, while the others wait.

        All ranks call it together. `run_steps` does so every --save_steps and after the last step, and `update` before
        it raises Diverged.

        Raises:
            Diverged: weights are NaN or Inf; there is no checkpoint of them.
        """
        if self.last_saved_step == self.step:
            return
        self.check_weights("checkpoint not saved")
        if not RANK:
            folder = checkpoint_path(self.args.save_dir, self.step)
            with name_output(folder, "--save_dir"), new_checkpoint_folder(folder) as temporary:
                self.write_model(temporary)
                write_state(temporary, self.model, self.optimization, progress=Progress(self.step, self.best),
                            settings=self.settings)
            log(f"saved {folder}")
            remove_old(self.args.save_dir, self.step, self.args.keep_checkpoints)
        self.last_saved_step = self.step
        wait_for_ranks()

    def update_best(self, measures: Mapping[str, float]) -> bool:
        """Compare an evaluation of the weights as they are now with the best one so far; see `BestEvaluation.update`.
        """
        return self.best.update(self.step, measures)

    def save_best(self) -> None:
        """Write the weights as they are now to model_best, which they replace: on rank 0, while the others wait.

        All ranks call it together, after `update_best` has returned True. The record gets the step and the measures.
        The training state is not written.
        """
        if not RANK:
            folder = best_path(self.args.save_dir)
            obsolete = os.listdir(folder) if os.path.isdir(folder) else ()  # every file there is of the older weights
            with name_output(folder, "--save_dir"), new_folder(folder, obsolete) as temporary:
                self.write_model(temporary)
                add_to_record(temporary, {"step": self.step, "measures": self.best.measures,
                                          "run_digest": self._run_digest()})
            log(f"saved {folder}: {self.best.describe()}")
        wait_for_ranks()

    def restore_best(self) -> None:
        """Restore the best evaluation of a run that is resumed with --save_best; see `read_best`."""
        self.best = read_best(best_path(self.args.save_dir), self._run_digest(), self.best)

    def _run_digest(self) -> str:
        return digest_run(self.settings.values, self.best.test_set_digest)

    def stops_early(self) -> bool:
        """Return whether --early_stopping ends the run before the next step, the same on all ranks, and log why."""
        patience = self.args.early_stopping
        if patience is None or self.best.evaluations_since < patience:
            return False
        if not RANK:
            evaluations = console.count(self.best.evaluations_since, "evaluation")
            log(f"stopping early after step {self.step}: {evaluations} in a row were not better than the best; "
                f"the best: {self.best.describe()}")
        return True

    def stop_requested(self) -> bool:
        """Return whether a signal asks to stop after this step; all ranks call it, and get the same answer."""
        return self.stop_signal.agreed_signal(self.step) > 0

    def finish_signal_handling(self) -> None:
        """Raise Stopped if a signal has come to any rank; otherwise let signals end the process at once from now on.

        All ranks call it together, when the last checkpoint is saved.

        Raises:
            Stopped: a signal has come.
        """
        number = self.stop_signal.signal_on_any_rank()
        if number:  # the handlers stay: a launcher repeats its signal
            raise Stopped(number)
        self.stop_signal.stop_listening()

    def log_step(self, loss: paddle.Tensor, batch_loss: BatchLoss | None = None) -> None:
        """Log the step that was taken last; see `TrainingLog.log_step`."""
        self.log.log_step(self.step, loss, self.optimization.learning_rate, batch_loss)

    def log_measures(self, group: str, measures: Mapping[str, float]) -> None:
        """Log an evaluation of the weights as they are now; see `TrainingLog.log_measures`."""
        self.log.log_measures(self.step, group, measures)

    def finish(self, hyper_parameters: Mapping[str, Any]) -> None:
        """Close the log, and wait for the other ranks."""
        self.log.close(hyper_parameters)
        wait_for_ranks()
