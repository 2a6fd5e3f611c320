"""Log a training run: lines on stderr, measures on stdout, and both in VisualDL."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from simcse import console
from simcse.console import log
from simcse.files import name_output
from simcse.machine import RANK
from simcse.training.gradients import BatchLoss

import numpy as np
from tqdm import tqdm

BINS = np.linspace(-1, 1, 51)  # of the histograms of cosines


class TrainingLog:
    """The log of a run. On other ranks than the first it does nothing.

    Args:
        folder: of the VisualDL log.
        step: steps that are done when the run starts, or goes on.
        total_steps: steps of the run.
        steps_per_epoch: steps of an epoch.
    """

    def __init__(self, folder: str, *, step: int, total_steps: int, steps_per_epoch: int) -> None:
        from visualdl import LogWriter

        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.logged_step = step
        self.logged_at = time.time()
        self.tags: list[str] = []  # of the scalars, in the order of their first appearance
        self.writer = None
        if not RANK:
            with name_output(folder, "--visualdl_dir"):
                os.makedirs(folder, exist_ok=True)  # VisualDL only warns where there is no such folder
                self.writer = LogWriter(logdir=folder)

    def log_step(self, step: int, loss: Any, learning_rate: float, batch_loss: BatchLoss | None = None) -> None:
        """Log a step, and how similar its positives and its negatives were.

        Args:
            step: its number, from 1.
            loss: a scalar; on a GPU it is waited for.
            learning_rate: of the step.
            batch_loss: what a contrastive loss compares; None: the loss has no pairs.
        """
        if self.writer is None:
            return
        epoch = 1 + (step - 1) // self.steps_per_epoch
        batch = 1 + (step - 1) % self.steps_per_epoch
        speed = (step - self.logged_step) / (time.time() - self.logged_at)
        left = tqdm.format_interval((self.total_steps - step) / speed)
        log(f"global step {step}, epoch: {epoch}, batch: {batch}, loss: {float(loss):.5f}, speed: {speed:.2f} step/s, "
            f"{left} left")
        self._add_scalars("train", step, {"loss": float(loss), "learning_rate": learning_rate, "speed": speed})
        if batch_loss is not None:
            self._add_cosines(step, batch_loss)
        self.writer.flush()
        self.logged_step = step
        self.logged_at = time.time()

    def _add_cosines(self, step: int, batch_loss: BatchLoss) -> None:
        """Add alignment, uniformity, and histograms of cosines, under the dropout of training.

        Positives are the cosines of each query with its title. Negatives are those of each query with the titles of
        all queries of another text, those that the loss leaves out for an equal title included; hard negatives are not
        in the histogram.
        """
        query = batch_loss.embeddings.query.numpy()
        title = batch_loss.embeddings.title.numpy()
        keys = np.arange(len(query))
        if batch_loss.duplicate_keys is not None:
            keys = batch_loss.duplicate_keys.query.numpy()
        positives = (query * title).sum(axis=1)
        self._add_scalars("train", step, {"alignment": alignment(positives)})
        self.writer.add_histogram("train/positive_cosines", positives, step, buckets=BINS)
        different = keys[:, None] != keys
        if different.any():  # a batch of one text, or of one text many times, has no negatives
            self._add_scalars("train", step, {"uniformity": uniformity((query @ query.T)[different])})
            negatives = (query @ title.T)[different]
            self.writer.add_histogram("train/negative_cosines", negatives, step, buckets=BINS)

    def log_measures(self, step: int, group: str, measures: Mapping[str, float]) -> None:
        """Print the measures of an evaluation to stdout, and add them to the log.

        Args:
            step: after which they were taken.
            group: "eval", or "whitened" after that.
            measures: by name, in percent; empty where there is no evaluation.
        """
        if self.writer is None or not measures:
            return
        whitened = "whitened, " if group == "whitened" else ""
        values = ", ".join(f"{name}={value}" for name, value in measures.items())
        console.print_result(f"global step {step}, {whitened}{values}")
        self._add_scalars(group, step, measures)
        self.writer.flush()

    def _add_scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            tag = f"{group}/{name}"
            self.writer.add_scalar(tag, value, step)
            if tag not in self.tags:
                self.tags.append(tag)

    def add_embeddings(self, texts: Sequence[str], embeddings: np.ndarray) -> None:
        """Add embeddings, float32 [texts, embedding_size], and their texts."""
        if self.writer is None:
            return
        self.writer.add_embeddings("texts", mat=embeddings.tolist(), metadata=list(texts))

    def close(self, hyper_parameters: Mapping[str, Any]) -> None:
        """Add the hyper-parameters, which VisualDL lists with the last loss and the last measures, and close the log.
        """
        if self.writer is None:
            return
        tags = [tag for tag in self.tags if tag == "train/loss" or not tag.startswith("train/")]
        if tags:
            shown = {name: value if type(value) in (int, float, str) else str(value)
                     for name, value in hyper_parameters.items()}
            self.writer.add_hparams(shown, tags)
        self.writer.close()


def alignment(positive_cosines: np.ndarray) -> float:
    """Return how far apart positives are, 0 at best: E |f(x) - f(x+)|^2 (Wang and Isola 2020,
    arXiv:2005.10242, eq. 2)."""
    return float(np.mean(2 - 2 * positive_cosines))


def uniformity(cosines: np.ndarray) -> float:
    """Return how evenly different texts fill the sphere, by their cosines, the lower the better:
    log E exp(-2 |f(x) - f(y)|^2) (Wang and Isola 2020, arXiv:2005.10242, eq. 3)."""
    return float(np.log(np.mean(np.exp(4 * cosines - 4))))
