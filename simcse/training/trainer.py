"""A training run between its loop and its machine: device, ranks, weights, checkpoints, log and stop signals.

The loop itself stands in train.py and in scripts/pretrain.py.
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
from simcse.device import gpu_precision, set_device
from simcse.encoder.paddle_patches import train_faster_on_cpu
from simcse.files import file_digest, new_folder
from simcse.machine import RANK, RANKS, TRAIN_PRECISIONS
from simcse.ranks import join_ranks, largest, wait_for_ranks
from simcse.training.log import TrainingLog
from simcse.training.optimization import Optimization
from simcse.training.state import prepare_save_dir, read_state, remove_old, write_state
from simcse.training.stopping import Stopped, StopSignal

import numpy as np
import paddle
from paddle import nn

LOG_STEPS = 10  # steps between log lines
CHECK_STEPS = 10  # steps after which the loss is looked at where that costs a wait
REMEDY = "A lower --learning_rate, --max_grad_norm 1 or --warmup_proportion 0.1 may help"


class Diverged(Exception):
    """The loss, or weights, contain NaN or Inf. The rank that has found it has reported it on stderr."""


def run_training(args: argparse.Namespace, train: Callable[[], None]) -> None:
    """Call `train` on the device asked for, and end the process with the exit code of the run: 0; 1 where it has
    diverged; 128 + the signal that has stopped it."""
    set_device(args.device, args.cpu_threads)
    if args.device == "gpu":
        gpu_precision(args.precision)  # refuses a precision that the GPU does not have before anything takes time
    started = time.time()
    random.seed(args.seed)
    np.random.seed(args.seed)
    paddle.seed(args.seed)
    code = 0
    try:
        train()
    except Diverged:
        code = 1
    except Stopped as stopped:
        code = 128 + stopped.signal
    if not RANK:
        log(f"totally cost {time.time() - started:.1f} s")
    raise SystemExit(code)


def check_one_precision(precision: str) -> None:
    """Raise InputError where ranks train in different precisions; their gradients could not be added up."""
    number = TRAIN_PRECISIONS.index(precision)
    highest = largest(number)
    lowest = -largest(-number)
    if highest != lowest:
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

    Attributes:
        network: the model, or the DataParallel that holds it, which exchanges gradients between ranks.
        step: steps that are done.
        total_steps: steps of the run.
        log: what the run tells.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Layer, texts: Any, steps_per_epoch: int,
                 write_model: Callable[[str], None]) -> None:
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
        self.settings = {"train_set_file": file_digest(texts.path), "number of processes": RANKS,
                         **{name: getattr(args, name) for name in args.shared_defaults}}
        if args.resume:
            self.step = read_state(args.resume, model, self.optimization, settings=self.settings,
                                   defaults=args.shared_defaults)
            log(f"resuming from {args.resume}")
        self.saved_step: int | None = None
        self.finite_step: int | None = None  # the last one after which all weights were found to be finite
        self.stop_signal = StopSignal()
        self.stop_signal.listen()
        self.log = TrainingLog(args.visualdl_dir, step=self.step, total_steps=self.total_steps,
                               steps_per_epoch=steps_per_epoch)

    def start_step(self) -> None:
        """Put the network into training mode, and seed dropout: it is a function of seed, rank and step, so that a
        resumed run has what an unbroken one has."""
        self.model.train()
        paddle.seed(((self.args.seed + RANK) * 1_000_003 + self.step) % 2**31)

    def scale(self, loss: paddle.Tensor) -> paddle.Tensor:
        """Return the loss as its gradients are to be taken: in fp16 it is scaled."""
        return self.optimization.scaler.scale(loss)

    def update(self, loss: paddle.Tensor, batch: Any, check_loss: bool) -> None:
        """Change the weights by the gradients of a batch's loss.

        Args:
            loss: a scalar.
            batch: has the `rows` of its texts, for the error message.
            check_loss: look at the loss in any case. On a CPU it is looked at in every step; on a GPU or on several
                ranks, where that means to wait for it, else every CHECK_STEPS steps.

        Raises:
            Diverged: the loss is not finite on some rank; the weights are left as they were.
        """
        waits = self.args.device != "cpu" or RANKS > 1
        if check_loss or not waits or (self.step + 1) % CHECK_STEPS == 0:
            self._check_loss(float(loss), batch)
        self.optimization.step()
        self.step += 1

    def _check_loss(self, loss: float, batch: Any) -> None:
        is_finite = math.isfinite(loss)
        if not is_finite:
            lines = sorted(self.texts.line_number(row) for row in batch.rows)
            warn(f"{console.PROGRAM}: error: the loss of step {self.step + 1} is {loss}; its batch is lines "
                 f"{', '.join(map(str, lines[:100]))} of --train_set_file. {REMEDY}")
        if largest(not is_finite):
            raise Diverged

    def weights_are_finite(self) -> bool:
        """Return whether no weight is NaN or Inf, on any rank."""
        if self.finite_step != self.step:
            is_finite = all(bool(paddle.isfinite(parameter).all()) for parameter in self.model.parameters())
            if largest(not is_finite):
                return False
            self.finite_step = self.step
        return True

    def check_weights(self) -> None:
        """Raise Diverged where weights are NaN or Inf, before they are evaluated or saved."""
        if self.weights_are_finite():
            return
        if not RANK:
            warn(f"{console.PROGRAM}: error: after step {self.step} weights contain NaN or Inf; checkpoint not saved. "
                 f"{REMEDY}")
        raise Diverged

    def save(self) -> None:
        """Write the checkpoint of this step, unless there is one: on rank 0, while the others wait. Raises Diverged
        where weights are NaN or Inf."""
        if self.saved_step == self.step:
            return
        self.check_weights()
        if not RANK:
            folder = os.path.join(self.args.save_dir, f"model_{self.step}")
            with new_folder(folder) as temporary:
                self.write_model(temporary)
                write_state(temporary, self.model, self.optimization, step=self.step, settings=self.settings)
            log(f"saved {folder}")
            remove_old(self.args.save_dir, self.step, self.args.keep_checkpoints)
        self.saved_step = self.step
        wait_for_ranks()

    def stop_requested(self) -> int:
        """Return the number of the signal to stop for now, 0: go on; all ranks have the same answer."""
        return self.stop_signal.agreed(self.step)

    def log_step(self, loss: paddle.Tensor, compared: Any = None) -> None:
        """Log the step that was taken last; see `TrainingLog.log_step`."""
        self.log.log_step(self.step, loss, self.optimization.learning_rate, compared)

    def log_measures(self, group: str, measures: Mapping[str, float]) -> None:
        """Log an evaluation of the weights as they are now; see `TrainingLog.log_measures`."""
        self.log.log_measures(self.step, group, measures)

    def finish(self, hyper_parameters: Mapping[str, Any]) -> None:
        """Close the log, and wait for the other ranks."""
        self.log.close(hyper_parameters)
        wait_for_ranks()
