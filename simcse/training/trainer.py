"""A training run: its optimizer, its place in the data, how it is stopped and gone on with, and what it tells."""

import argparse
import contextlib
import io
import math
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from simcse import console
from simcse.console import InputError, log, log_from_handler, warn
from simcse.device import gpu_precision, set_device
from simcse.encoder.paddle_patches import train_faster_on_cpu
from simcse.encoder.weights import STATE_FILE, STATE_RECORD, read_weights, saved_steps, write_weights
from simcse.files import file_digest, read_json, write_json
from simcse.flags import TRAIN_PRECISIONS
from simcse.machine import RANK, RANKS
from simcse.ranks import LAUNCHER_GONE, join_ranks, largest, wait_for_ranks

import numpy as np
import paddle
from tqdm import tqdm

REMEDY = "A lower --learning_rate, --max_grad_norm 1 or --warmup_proportion 0.1 may help"
BINS = np.linspace(-1, 1, 51)  # of the histograms of cosines


def run_training(args: argparse.Namespace, train: Callable[[], "Run"]) -> None:
    """Train on the device asked for, and exit with the code of the run that `train` returns."""
    set_device(args.device, args.cpu_threads)
    if args.device == "gpu":
        gpu_precision(args.precision)  # before anything takes time
    started = time.time()
    random.seed(args.seed)
    np.random.seed(args.seed)
    paddle.seed(args.seed)
    run = train()
    if not run.code:
        run.finish()
    if not RANK:
        log(f"totally cost {time.time() - started:.1f} s")
    raise SystemExit(run.code)


class Run:
    """The steps of a training run, from the checkpoint in --resume on where there is one.

        for batch in run.batches(...):
            loss = ...  # and its gradients, of run.network, scaled by run.scaler.scale
            run.update(loss, batch)

    `args` are as `flags.check_run_arguments` returns them, `texts` is the training file, a `data.TextFile`; `write`
    writes a checkpoint to a folder, with what a function of that folder, its second argument, adds. `network` is the
    model, or the DataParallel that holds it; `step` of `steps` steps are done; `code` is the exit code of a run that
    was ended before its last one: 1 for a loss, or weights, that are no numbers, 128 + the signal."""

    def __init__(self, args: argparse.Namespace, model: Any, texts: Any, epoch_steps: int, write: Callable) -> None:
        from paddlenlp.transformers import LinearDecayWithWarmup
        from visualdl import LogWriter

        self.args, self.model, self.texts, self.write = args, model, texts, write
        join_ranks()
        precision = TRAIN_PRECISIONS.index(args.precision)
        if largest(precision) != -largest(-precision):  # gradients that are scaled would be added to others
            raise InputError(f"--precision: {args.precision} on this machine, and another on another; give all the "
                             "same one")
        if not RANK:  # weights, and two moments of each
            prepare_save_dir(args.save_dir, 12 * sum(parameter.size for parameter in model.parameters()))
        wait_for_ranks()
        if args.device == "cpu":
            train_faster_on_cpu(model)
        self.network = paddle.DataParallel(model) if RANKS > 1 else model  # gives all ranks the weights of rank 0
        self.steps, self.step, self.code, self.saved, self.sound = epoch_steps * args.epochs, 0, 0, None, None
        self.schedule = LinearDecayWithWarmup(args.learning_rate, self.steps, args.warmup_proportion)
        self.optimizer = make_optimizer(args, model, self.schedule)
        scales = args.precision == "fp16" and args.device == "gpu"
        self.scaler = paddle.amp.GradScaler(enable=scales, init_loss_scaling=2.0**15)
        self.settings = {"train_set_file": file_digest(texts.path), "number of processes": RANKS,
                         **{name: getattr(args, name) for name in args.learns_by}}
        if args.resume:
            self._read_state(args.resume)
        self.signal = 0  # that was sent to stop this process
        for number in (signal.SIGINT, signal.SIGTERM, LAUNCHER_GONE):
            signal.signal(number, self._request_stop)
        self.logged_step, self.logged_at = self.step, time.time()
        self.scalars: dict[str, None] = {}  # those that were logged, in the order of their first appearance
        self.writer = None if RANK else LogWriter(logdir=args.visualdl_dir)

    def batches(self, batches: Iterable[tuple[int, int, Any]]) -> Iterator[Any]:
        """Yield the batches of the steps to come, which come with their epoch and their place in it, and save when it
        is time, until `code` says that the run ends."""
        with console.progress("training", self.steps, "steps", lines=False, done=self.step) as advance:
            for self.epoch, self.number, batch in batches:
                self.model.train()
                # Dropout is a function of seed, rank and step, so that a resumed run has what an unbroken one has.
                paddle.seed(((self.args.seed + RANK) * 1_000_003 + self.step) % 2**31)
                yield batch
                if self.code:
                    return
                advance()
                if self.step % self.args.save_steps == 0:
                    self.save()
                if not self.code and (number := self._stops()):
                    self.save()
                    self.code = self.code or 128 + number
                if self.code:
                    return
        self.save()

    def update(self, loss: paddle.Tensor, batch: Any) -> None:
        """Take a step by the gradients of `loss`; where it is no number on any rank, say what can be said of it, and
        save, where the weights still are numbers. On several ranks and on a GPU, whose loss is waited for, it is looked
        at every tenth step, and where it is acted on."""
        looks = self.args.device == "cpu" and RANKS == 1
        if looks or (self.step + 1) % 10 == 0 or self._is_acted_on(self.step + 1):
            bad = not math.isfinite(float(loss))
            if largest(bad):
                if bad:
                    lines = sorted(self.texts.line_number(row) for row in batch.rows)
                    warn(f"{console.PROGRAM}: error: the loss of step {self.step + 1} is {float(loss)}; its batch is "
                         f"lines {', '.join(map(str, lines[:100]))} of --train_set_file. {REMEDY}")
                self.code = 1
                self.save()
                return
        learning_rate = self.optimizer.get_lr()
        take_step(self.optimizer, self.scaler)
        self.schedule.step()
        self.optimizer.clear_grad()
        self.step += 1
        if self._is_acted_on(self.step):
            self._look_at_weights()
        if self.step % 10 == 0 and not RANK and not self.code:
            self._log_step(float(loss), learning_rate)  # on a GPU the only wait for the device

    def _is_acted_on(self, step: int) -> bool:
        """Whether the weights after a step are saved or measured."""
        every = self.args.save_steps, vars(self.args).get("eval_steps")
        return step == self.steps or any(step % steps == 0 for steps in every if steps)

    def _look_at_weights(self) -> bool:
        """Whether the weights are numbers, on all ranks; where they are not, `code` ends the run."""
        if self.sound != self.step:
            if largest(not all(bool(paddle.isfinite(parameter).all()) for parameter in self.model.parameters())):
                if not self.code and not RANK:
                    warn(f"{console.PROGRAM}: error: after step {self.step} weights are no numbers; they are not "
                         f"saved. {REMEDY}")
                self.code = 1
                return False
            self.sound = self.step
        return True

    def _request_stop(self, number: int, _) -> None:
        """Have the run stop after the step at hand; a second Ctrl-C or SIGTERM ends it at once."""
        if "PADDLE_TRAINER_ID" in os.environ:  # a launcher sends SIGTERM several times before it kills
            self.signal = signal.SIGTERM
            return
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        log_from_handler(f"{signal.Signals(number).name}: saving after this step; once more to stop without saving")

    def _stops(self) -> int:
        """The signal to stop for after this step, 0: none. Ranks stop after the same one, so they ask each other, every
        10 steps."""
        if RANKS == 1:
            return self.signal
        return 0 if self.step % 10 else largest(self.signal)

    def save(self) -> None:
        """Write a checkpoint, on rank 0, while the others wait; but none of weights that are no numbers."""
        if self.saved == self.step or not self._look_at_weights():
            return
        if not RANK:
            folder = os.path.join(self.args.save_dir, f"model_{self.step}")
            self.write(folder, self._write_state)
            log(f"saved {folder}")
            remove_old(self.args.save_dir, self.step, self.args.keep_checkpoints)
        self.saved = self.step
        wait_for_ranks()

    def _write_state(self, folder: str) -> None:
        """Write what training goes on from: the optimizer's moments, by the names of the model's parameters, and a
        record of the rest."""
        state, own = self.optimizer.state_dict(), self.model.named_parameters()
        write_weights(os.path.join(folder, STATE_FILE), {
            f"{name}|{key.removeprefix(parameter.name + '_')}": tensor for name, parameter in own
            for key, tensor in state.items() if key.startswith(parameter.name + "_")})
        write_json(os.path.join(folder, STATE_RECORD), {
            "step": self.step, "run": self.settings, "scaler": scaler_record(self.scaler),
            "schedule": state["LR_Scheduler"]})

    def _read_state(self, folder: str) -> None:
        """Go on from what `_write_state` wrote. It raises InputError where that is of a run with another training file,
        batch size or setting."""
        record = read_json(os.path.join(folder, STATE_RECORD))
        settings, run = self.settings, record["run"]
        changes = [name if name == "train_set_file" else f"{name} {settings[name]} instead of {run[name]}"
                   for name in settings if run.get(name, settings[name]) != settings[name]]  # older records have fewer
        changes += [f"{name} {value}, which is no longer there" for name, value in run.items()
                    if name not in settings and value not in (None, False, 0, 1, "contrastive")]
        if changes:
            raise InputError(f"--resume {folder}: is of a run with another {', '.join(changes)}; --init_from_ckpt "
                             "starts a new run from its weights")
        names = {name: parameter.name for name, parameter in self.model.named_parameters()}
        state = {"LR_Scheduler": record["schedule"]}
        for key, array in read_weights(os.path.join(folder, STATE_FILE), "--resume").items():
            name, kind = key.rsplit("|", 1)
            state[f"{names[name]}_{kind}"] = paddle.to_tensor(array)
        self.optimizer.set_state_dict(state)
        if record["scaler"]:
            restore_scaler(self.scaler, record["scaler"])
        self.step = record["step"]
        log(f"going on from {folder}")

    def _log_step(self, loss: float, learning_rate: float) -> None:
        """Log a step, and how similar its positives and its negatives were, under the dropout of training."""
        speed = (self.step - self.logged_step) / (time.time() - self.logged_at)
        log(f"global step {self.step}, epoch: {self.epoch}, batch: {self.number}, loss: {loss:.5f}, "
            f"speed: {speed:.2f} step/s, {tqdm.format_interval((self.steps - self.step) / speed)} left")
        scalars = {"loss": loss, "learning_rate": learning_rate, "speed": speed}
        if compared := getattr(self.model, "compared", None):  # of a contrastive loss
            embeddings, duplicate_keys = compared
            query, title = embeddings.query.numpy(), embeddings.title.numpy()
            keys = np.arange(len(query)) if duplicate_keys is None else duplicate_keys.query.numpy()
            different = keys[:, None] != keys
            positives = (query * title).sum(axis=1)
            scalars["alignment"] = alignment(positives)
            self.writer.add_histogram("train/positive_cosines", positives, self.step, buckets=BINS)
            if different.any():  # a batch of one text, or of one text many times, has no negatives
                scalars["uniformity"] = uniformity((query @ query.T)[different])
                negatives = (query @ title.T)[different]
                self.writer.add_histogram("train/negative_cosines", negatives, self.step, buckets=BINS)
        self._log_scalars("train", scalars)
        self.logged_step, self.logged_at = self.step, time.time()

    def log_measures(self, measures: dict[str, float], group: str) -> None:
        """Print the measures of an evaluation to stdout, and log them; `group`: "eval", or "whitened" after that."""
        console.result(f"global step {self.step}, " + "whitened, " * (group == "whitened") + ", ".join(
            f"{name}={value}" for name, value in measures.items()))
        self._log_scalars(group, measures)

    def _log_scalars(self, group: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, self.step)
            self.scalars[f"{group}/{name}"] = None
        self.writer.flush()

    def finish(self) -> None:
        """Log the hyper-parameters with the final measures, and wait for the other ranks."""
        if measures := [name for name in self.scalars if name == "train/loss" or not name.startswith("train/")]:
            values = {name: getattr(self.args, name) for name in self.args.hyper_parameters}
            self.writer.add_hparams({name: value if type(value) in (int, float, str) else str(value)
                                     for name, value in values.items()}, measures)
        if not RANK:
            self.writer.close()
        wait_for_ranks()


def make_optimizer(args: argparse.Namespace, model: Any, schedule: Any) -> paddle.optimizer.Optimizer:
    """AdamW, which does not decay biases and norms; without decay that is Adam, which updates all parameters by one
    operator."""
    clip = paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm else None
    if not args.weight_decay:
        return paddle.optimizer.Adam(schedule, parameters=model.parameters(), grad_clip=clip, use_multi_tensor=True)
    decayed = {parameter.name for name, parameter in model.named_parameters()
               if "bias" not in name and "norm" not in name}
    return paddle.optimizer.AdamW(schedule, parameters=model.parameters(), weight_decay=args.weight_decay,
                                  apply_decay_param_fun=decayed.__contains__, grad_clip=clip)


def take_step(optimizer: paddle.optimizer.Optimizer, scaler: paddle.amp.GradScaler) -> None:
    """Update the parameters by gradients that are scaled; where these are no numbers, lower the scale instead."""
    scaler.step(optimizer)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        scaler.update()
    if said.getvalue() and not RANK:
        scale = scaler_record(scaler)["scale"]
        log(f"gradients beyond the range of fp16: a step is left out, the scale of the loss is {scale:g} from now on")


def scaler_record(scaler: paddle.amp.GradScaler) -> dict[str, float]:
    """The state of a loss scaler, as JSON has it; {} of one that is off."""
    return {name: value if isinstance(value, (bool, int)) else float(np.ravel(value)[0])
            for name, value in scaler.state_dict().items()}


def restore_scaler(scaler: paddle.amp.GradScaler, record: dict[str, float]) -> None:
    """Give a loss scaler the state of a `scaler_record`."""
    scaler.load_state_dict({**record, "scale": np.array([record["scale"]], "float32")})


def alignment(positives: np.ndarray) -> float:
    """How far apart positives of these cosines are, 0 at best: E |f(x) - f(x+)|^2 (Wang and Isola 2020,
    arXiv:2005.10242, eq. 2)."""
    return float(np.mean(2 - 2 * positives))


def uniformity(cosines: np.ndarray) -> float:
    """How evenly different texts, of these cosines, fill the sphere, the lower the better:
    log E exp(-2 |f(x) - f(y)|^2) (ibid., eq. 3)."""
    return float(np.log(np.mean(np.exp(4 * cosines - 4))))


def remove_old(save_dir: str, step: int, keep: int) -> None:
    """Of the checkpoints up to `step` keep the newest `keep` (0: all), and training state in the newest alone."""
    steps = [each for each in saved_steps(save_dir) if each <= step]
    for each in steps[:-1]:
        folder = Path(save_dir, f"model_{each}")
        if each in steps[-keep:]:
            for name in (STATE_RECORD, STATE_FILE):
                (folder / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(folder.rename(folder.with_name(f".model_{each}.tmp")))  # never half of it under its name


def prepare_save_dir(save_dir: str, needed: int) -> None:
    """Make the folder, and remove what a killed run left half written. It raises InputError where that is no folder, is
    not writable, or cannot hold `needed` bytes."""
    try:
        os.makedirs(save_dir, exist_ok=True)
        for left in Path(save_dir).glob(".model_*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        tempfile.TemporaryFile(dir=save_dir).close()
    except OSError as error:
        raise InputError(f"--save_dir {save_dir}: {(error.strerror or str(error)).lower()}") from None
    if (free := shutil.disk_usage(save_dir).free) < needed:
        raise InputError(f"--save_dir {save_dir}: {free / 1e9:.1f} GB are free, and a checkpoint takes "
                         f"{needed / 1e9:.1f} GB")
