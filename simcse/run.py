"""A training run: its optimizer, its place in the data, how it is stopped and gone on with, and what it tells."""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from simcse import console
from simcse.console import InputError, log, log_from_handler
from simcse.files import file_digest
from simcse.ranks import LAUNCHER_GONE, is_first_rank, join_ranks, wait_for_ranks
from simcse.weights import STATE_FILE, STATE_RECORD, read_weights, saved_steps, write_weights

import numpy as np
import paddle

BINS = np.linspace(-1, 1, 51)  # of the histograms of cosines


class Run:
    """The steps of a training run, from the checkpoint in --resume on where there is one.

        for batch in run.batches(...):
            loss = ...  # and its gradients, of run.network, scaled by run.scale_loss
            run.update(loss, batch)

    Args:
        args: the flags, with `learns_by`: the names of those that the result depends on.
        model: the network; `network` is it too, or the DataParallel that holds it.
        texts: the training file, a `data.TextFile`.
        epoch_steps: how many steps an epoch has.
        write: writes a checkpoint to a folder, with what a function of that folder, its second argument, adds.

    Attributes:
        step: how many steps are done.
        code: exit code of a run that was ended before its last step: 1 for a loss that is no number, 128 + the signal.
    """

    def __init__(self, args: argparse.Namespace, model: Any, texts: Any, epoch_steps: int,
                 write: Callable[[str, Callable[[str], None]], None]) -> None:
        self.args, self.model, self.texts, self.write = args, model, texts, write
        self.rank, ranks = join_ranks()
        if is_first_rank():  # weights, and two moments of each
            prepare_save_dir(args.save_dir, 12 * sum(parameter.size for parameter in model.parameters()))
        wait_for_ranks()
        self.network = paddle.DataParallel(model) if ranks > 1 else model  # gives all ranks the weights of rank 0
        self.steps, self.code, self.saved = epoch_steps * args.epochs, 0, None
        self.optimizer, self.schedule = build_optimizer(args, model, self.steps)
        self.scaler = paddle.amp.GradScaler(enable=args.precision == "fp16", init_loss_scaling=2.0**15)
        self.scale_loss = self.scaler.scale
        self.settings = {"train_set_file": file_digest(texts.path), "number of processes": ranks,
                         **{name: getattr(args, name) for name in args.learns_by}}
        self.step = resume(args.resume, self.settings, model, self.optimizer, self.scaler) if args.resume else 0
        self.reporter, self.stop = Reporter(args, self.steps, self.step), Stop()

    def batches(self, batches: Iterable[tuple[int, int, Any]]) -> Iterator[Any]:
        """Yield the batches of the steps to come, and save when it is time, until `code` says that the run ends.

        Args:
            batches: epoch, place in it, and batch of each step.
        """
        with console.progress("training", self.steps, "steps", lines=False, done=self.step) as advance:
            for epoch, number, batch in batches:
                self.model.train()
                # Dropout is a function of seed, rank and step, so that a resumed run has what an unbroken one has.
                paddle.seed(((self.args.seed + self.rank) * 1_000_003 + self.step) % 2**31)
                self.epoch, self.number = epoch, number
                yield batch
                if self.code:
                    return
                advance()
                if self.step % self.args.save_steps == 0:
                    self.save()
                if self.stop.requested(self.step):
                    self.save()
                    self.code = 128 + self.stop.signal
                    return
        self.save()

    def update(self, loss: paddle.Tensor, batch: Any) -> None:
        """Take a step by the gradients of `loss`, unless it is no number."""
        if (self.args.device == "cpu" or self.step % 10 == 9) and not math.isfinite(float(loss)):
            self._diverged(float(loss), batch)
            return
        learning_rate = self.optimizer.get_lr()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.clear_grad()
        self.step += 1
        if self.step % 10 == 0:
            self.reporter.log_step(self.step, self.epoch, self.number, loss, learning_rate,
                                   getattr(self.model, "compared", None))

    def _diverged(self, loss: float, batch: Any) -> None:
        """Say what can be said of a loss that is no number, and save, where the weights still are numbers."""
        self.code = 1
        if all(bool(paddle.isfinite(parameter).all()) for parameter in self.model.parameters()):
            self.save()
        lines = sorted(self.texts.line_number(row) for row in batch.rows)
        log(f"{console.program()}: error: the loss of step {self.step + 1} is {loss}; its batch is lines "
            f"{', '.join(map(str, lines[:100]))} of --train_set_file. A lower --learning_rate, --max_grad_norm 1 or "
            "--warmup_proportion 0.1 may help")

    def save(self) -> None:
        """Write a checkpoint, on rank 0, while the others wait."""
        if self.saved == self.step:
            return
        if is_first_rank():
            folder = os.path.join(self.args.save_dir, f"model_{self.step}")
            self.write(folder, self._write_state)
            log(f"saved {folder}")
            remove_old(self.args.save_dir, self.step, self.args.keep_checkpoints)
        self.saved = self.step
        wait_for_ranks()

    def _write_state(self, folder: str) -> None:
        scaler = {name: value if isinstance(value, (bool, int)) else float(value)
                  for name, value in self.scaler.state_dict().items()}
        write_training_state(folder, self.model, self.optimizer, {
            "step": self.step, "run": self.settings, "scaler": scaler})


def set_seed(seed: int) -> None:
    """Seed whatever draws at random."""
    random.seed(seed)
    np.random.seed(seed)
    paddle.seed(seed)


def build_optimizer(args: argparse.Namespace, model: Any, steps: int) -> tuple[Any, Any]:
    """AdamW, and its learning-rate schedule over `steps` steps."""
    from paddlenlp.transformers import LinearDecayWithWarmup

    schedule = LinearDecayWithWarmup(args.learning_rate, steps, args.warmup_proportion)
    decayed = {parameter.name for name, parameter in model.named_parameters()
               if not any(part in name for part in ("bias", "norm"))}
    clip = paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm) if args.max_grad_norm else None
    optimizer = paddle.optimizer.AdamW(learning_rate=schedule, parameters=model.parameters(), grad_clip=clip,
                                       weight_decay=args.weight_decay, apply_decay_param_fun=decayed.__contains__)
    return optimizer, schedule


class Stop:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step at hand; a second one ends at once.

    Not so under a launcher: it sends SIGTERM twice, a second apart, and kills three seconds later.
    """

    signal = None

    def __init__(self) -> None:
        self.launched = "PADDLE_TRAINER_ID" in os.environ
        for number in (signal.SIGINT, signal.SIGTERM, LAUNCHER_GONE):
            signal.signal(number, self._request)

    def _request(self, number: int, _) -> None:
        if self.launched:
            self.signal = signal.SIGTERM
            return
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        log_from_handler(f"{signal.Signals(number).name}: saving after this step; once more to stop without saving")

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. Ranks stop after the same one, so they ask each other, every 10 steps."""
        if paddle.distributed.get_world_size() == 1:
            return self.signal is not None
        if step % 10:
            return False
        signals = paddle.to_tensor([self.signal or 0])
        paddle.distributed.all_reduce(signals, op=paddle.distributed.ReduceOp.MAX)
        self.signal = int(signals) or None
        return self.signal is not None


# ------------------------------------------------------------------------------------------- what training goes on from
def write_training_state(folder: str, model: Any, optimizer: Any, record: dict) -> None:
    """Write the optimizer's moments, by the names of the model's parameters, and `record` with the schedule's state."""
    state, moments = optimizer.state_dict(), {}
    for name, parameter in model.named_parameters():
        start = f"{parameter.name}_"
        moments.update({f"{name}|{key[len(start):]}": tensor for key, tensor in state.items() if key.startswith(start)})
    write_weights(os.path.join(folder, STATE_FILE), moments)
    with open(os.path.join(folder, STATE_RECORD), "w", encoding="utf-8") as file:
        json.dump({**record, "schedule": state["LR_Scheduler"]}, file, indent=2)


def read_training_record(folder: str) -> dict:
    """What `write_training_state` was given as `record`, and the schedule's state.

    Raises:
        InputError: the folder is no checkpoint that training can go on from.
    """
    try:
        with open(os.path.join(folder, STATE_RECORD), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        raise InputError(f"--resume {folder}: not a checkpoint that training can go on from (no {STATE_RECORD}); "
                         "--init_from_ckpt starts anew from its weights") from None


def restore_optimizer(folder: str, model: Any, optimizer: Any, record: dict) -> None:
    """Give the optimizer, and its schedule, the state of `write_training_state`."""
    name_of = {name: parameter.name for name, parameter in model.named_parameters()}
    state = {}
    for key, array in read_weights(os.path.join(folder, STATE_FILE), "--resume").items():
        name, kind = key.rsplit("|", 1)
        state[f"{name_of[name]}_{kind}"] = paddle.to_tensor(array)
    optimizer.set_state_dict({**state, "LR_Scheduler": record["schedule"]})


def resume(folder: str, settings: dict, model: Any, optimizer: Any, scaler: Any) -> int:
    """The step of the checkpoint in `folder`, whose state optimizer, schedule and scaler get.

    Raises:
        InputError: it is of a run with another training file, batch size or other setting.
    """
    record = read_training_record(folder)
    run = record["run"]
    changes = [name if name == "train_set_file" else f"{name} {settings[name]} instead of {run[name]}"
               for name in settings if run.get(name, settings[name]) != settings[name]]  # older records have fewer
    changes += [f"{name} {value}, which is no longer there" for name, value in run.items()
                if name not in settings and value not in (None, False, 0, 1, "contrastive")]
    if changes:
        raise InputError(f"--resume {folder}: is of a run with another {', '.join(changes)}; --init_from_ckpt starts a "
                         "new run from its weights")
    restore_optimizer(folder, model, optimizer, record)
    if record["scaler"]:
        scaler.load_state_dict(record["scaler"])
    log(f"going on from {folder}")
    return record["step"]


def remove_old(save_dir: str, step: int, keep: int) -> None:
    """Of the checkpoints up to `step` keep the newest `keep` (0: all), and training state in the newest alone."""
    older = [each for each in saved_steps(save_dir) if each < step]
    kept = older[max(0, len(older) - keep + 1) :] if keep else older
    for each in older:
        folder = os.path.join(save_dir, f"model_{each}")
        if each in kept:
            for name in (STATE_RECORD, STATE_FILE):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
        else:
            aside = os.path.join(save_dir, f".model_{each}.tmp")  # never half of it under its name
            os.rename(folder, aside)
            shutil.rmtree(aside)


def prepare_save_dir(save_dir: str, needed: int) -> None:
    """Make the folder, remove what a killed run left half written, and refuse one that cannot hold `needed` bytes.

    Raises:
        InputError: not a folder, not writable, or too little space.
    """
    try:
        os.makedirs(save_dir, exist_ok=True)
        for name in os.listdir(save_dir):
            if re.fullmatch(r"\.model_\d+\.(.*\.)?tmp", name):
                shutil.rmtree(os.path.join(save_dir, name), ignore_errors=True)
        with tempfile.TemporaryFile(dir=save_dir):
            pass
    except OSError as error:
        raise InputError(f"--save_dir {save_dir}: {(error.strerror or str(error)).lower()}") from None
    if (free := shutil.disk_usage(save_dir).free) < needed:
        raise InputError(f"--save_dir {save_dir}: {free / 1e9:.1f} GB are free, and a checkpoint takes "
                         f"{needed / 1e9:.1f} GB")


# -------------------------------------------------------------------------------------------------- what it tells
def alignment(positives: np.ndarray) -> float:
    """How far apart positives are, 0 at best: E |f(x) - f(x+)|^2 (Wang and Isola 2020, arXiv:2005.10242, eq. 2).

    Args:
        positives: their cosines, [batch].
    """
    return float(np.mean(2 - 2 * positives))


def uniformity(cosines: np.ndarray) -> float:
    """How evenly texts fill the sphere, the lower the better: log E exp(-2 |f(x) - f(y)|^2) (ibid., eq. 3).

    Args:
        cosines: of different texts.
    """
    return float(np.log(np.mean(np.exp(4 * cosines - 4))))


class Reporter:
    """What rank 0 tells of a run: log lines, evaluations, and the VisualDL log. Other ranks do nothing.

    Args:
        steps: how many the whole run has.
        step: how many are done already.
    """

    def __init__(self, args: argparse.Namespace, steps: int, step: int) -> None:
        self.args, self.steps, self.active = args, steps, is_first_rank()
        self.logged_step, self.logged_at = step, time.time()
        self.measures: dict[str, None] = {}  # the scalars that hyper-parameters are shown with
        if self.active:
            from visualdl import LogWriter

            self.writer = LogWriter(logdir=args.visualdl_dir)

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

    def log_step(self, step: int, epoch: int, batch: int, loss: paddle.Tensor, learning_rate: float,
                 compared: tuple | None) -> None:
        """Log a step.

        Args:
            compared: what the loss is of, where it is contrastive; see `SimCSE.loss`.
        """
        if not self.active:
            return
        from tqdm import tqdm

        value = float(loss)  # the only wait for the device
        speed = (step - self.logged_step) / (time.time() - self.logged_at)
        left = tqdm.format_interval((self.steps - step) / speed)
        log(f"global step {step}, epoch: {epoch}, batch: {batch}, loss: {value:.5f}, speed: {speed:.2f} step/s, "
            f"{left} left")
        self._scalars("train", {"loss": value, "learning_rate": learning_rate, "speed": speed}, step)
        if compared:
            self._log_cosines(step, *(None if rows is None else rows.numpy() for rows in compared))
        self.measures["train/loss"] = None
        self.logged_step, self.logged_at = step, time.time()

    def _log_cosines(self, step: int, query: np.ndarray, title: np.ndarray, keys: np.ndarray | None) -> None:
        """How similar the last batch's positives and its negatives were, under the dropout of training."""
        keys = np.arange(len(query)) if keys is None else keys.reshape(len(query), -1)[:, 0]
        different = keys[:, None] != keys
        positives = (query * title).sum(axis=1)
        self._scalars("train", {"alignment": alignment(positives)}, step)
        self.writer.add_histogram("train/positive_cosines", positives, step, buckets=BINS)
        if different.any():  # a batch of one text, or of one text many times, has no negatives
            self._scalars("train", {"uniformity": uniformity((query @ query.T)[different])}, step)
            self.writer.add_histogram("train/negative_cosines", (query @ title.T)[different], step, buckets=BINS)
        self.writer.flush()

    def log_measures(self, step: int, measures: dict[str, float], group: str = "eval") -> None:
        """Print the measures of an evaluation to stdout, and log them.

        Args:
            group: "eval", or "whitened" for those of the whitened network.
        """
        console.result(f"global step {step}, " + "whitened, " * (group == "whitened") + ", ".join(
            f"{name}={value}" for name, value in measures.items()))
        self._scalars(group, measures, step)
        self.measures.update({f"{group}/{name}": None for name in measures})

    def finish(self, texts: Sequence[str] = (), embeddings: np.ndarray | None = None) -> None:
        """Log what there is to say of the whole run: some texts' embeddings, float32 [texts, embedding_size], and the
        hyper-parameters with the final measures."""
        if not self.active:
            return
        if embeddings is not None:
            self.writer.add_embeddings("texts", mat=embeddings.tolist(), metadata=list(texts))
        if self.measures:
            values = {name: getattr(self.args, name) for name in self.args.hyper_parameters}
            self.writer.add_hparams({name: value if type(value) in (int, float, str) else str(value)
                                     for name, value in values.items()}, list(self.measures))
        self.writer.close()
