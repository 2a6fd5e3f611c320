"""What is told of a training run: evaluations, log lines, the VisualDL log; and its checkpoints."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

import console
import data

BINS = np.linspace(-1, 1, 51)  # of the histograms of cosines
# Flags that say where a run reads and writes, not what it learns with: no hyper-parameters.
PLACES = ("quiet", "train_set_file", "test_set_file", "strict_data", "device", "cpu_threads", "resume", "save_dir",
          "save_steps", "save_format", "keep_checkpoints", "eval_steps", "visualdl_dir", "visualdl_embeddings",
          "whiten")


def read_test_set(args: argparse.Namespace) -> Callable | None:
    """Read --test_set_file; returns `evaluate(embed) -> {measure: value}`, or None without a test set."""
    if not args.test_set_file:
        return None
    flag, strict = "--test_set_file", args.strict_data
    if data.count_columns(args.test_set_file, flag, (2, 3)) == 3:
        triples = data.read_labeled_pairs(args.test_set_file, flag, strict)
        return lambda embed: spearman(embed, triples)
    pairs = data.read_text_pairs(args.test_set_file, flag, strict)
    return lambda embed: recall(embed, pairs)


def spearman(embed: Callable, triples: list[tuple[str, str, float]]) -> dict[str, float]:
    """Spearman's rank correlation, in percent, of the cosines with the labels."""
    from scipy.stats import spearmanr

    first, second, labels = zip(*triples)
    cosines = (embed(first) * embed(second)).sum(axis=1)
    return {"spearman": round(100 * float(spearmanr(cosines, labels)[0]), 3)}


def recall(embed: Callable, pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Recall@k, in percent, of each distinct query's targets among all distinct targets, by exact search."""
    from ann_util import exact_search
    from metrics import first_hits, recall_at

    queries, corpus = (data.distinct(side) for side in zip(*pairs))
    row_of = {text: row for row, text in enumerate(corpus)}
    targets: dict[str, set[int]] = {}
    for query, target in pairs:
        targets.setdefault(query, set()).add(row_of[target])
    rows, _ = exact_search(embed(queries), embed(corpus), max(data.RECALL_KS))
    recalled = recall_at(first_hits(rows, [targets[query] for query in queries]), data.RECALL_KS)
    return {f"recall@{k}": value for k, value in recalled.items()}


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
    """What rank 0 does beside the steps: log lines, VisualDL, evaluation, checkpoints. Other ranks do nothing.

    Args:
        evaluate: of `read_test_set`.
        texts: the training texts, of which --visualdl_embeddings takes some.
        steps: how many the whole run has; `step`: how many are done already.
        write_state: adds the training state to a checkpoint's folder.
    """

    def __init__(self, args: argparse.Namespace, model, tokenizer, record: dict, evaluate: Callable | None,
                 texts: Sequence[str], steps: int, step: int, write_state: Callable[[str, int], None]) -> None:
        from model import is_first_rank, wait_for_ranks

        self.args, self.model, self.tokenizer, self.record, self.test = args, model, tokenizer, record, evaluate
        self.texts, self.steps, self.write_state = texts, steps, write_state
        self.active, self.wait = is_first_rank(), wait_for_ranks
        self.evaluated = self.saved = None
        self.logged_step, self.logged_at = step, time.time()
        self.measures: dict[str, None] = {}  # the scalars that hyper-parameters are shown with
        if self.active:
            from visualdl import LogWriter

            self.writer = LogWriter(logdir=args.visualdl_dir)

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

    def log_step(self, step: int, epoch: int, batch: int, loss, learning_rate: float) -> None:
        if not self.active:
            return
        from tqdm import tqdm

        value = float(loss)  # the only wait for the device
        speed = (step - self.logged_step) / (time.time() - self.logged_at)
        left = tqdm.format_interval((self.steps - step) / speed)
        console.log(f"global step {step}, epoch: {epoch}, batch: {batch}, loss: {value:.5f}, speed: {speed:.2f} step/s"
                    f", {left} left")
        self._scalars("train", {"loss": value, "learning_rate": learning_rate, "speed": speed}, step)
        if self.args.objective != "mlm":
            self._log_cosines(step)
        self.measures["train/loss"] = None
        self.logged_step, self.logged_at = step, time.time()

    def _log_cosines(self, step: int) -> None:
        """How similar the last batch's positives and its negatives were, under the dropout of training."""
        query, title, keys = (None if rows is None else rows.numpy() for rows in self.model.compared)
        keys = np.arange(len(query)) if keys is None else keys.reshape(len(query), -1)[:, 0]
        different = keys[:, None] != keys
        positives = (query * title).sum(axis=1)
        self._scalars("train", {"alignment": alignment(positives)}, step)
        self.writer.add_histogram("train/positive_cosines", positives, step, buckets=BINS)
        if different.any():  # a batch of one text, or of one text many times, has no negatives
            self._scalars("train", {"uniformity": uniformity((query @ query.T)[different])}, step)
            self.writer.add_histogram("train/negative_cosines", (query @ title.T)[different], step, buckets=BINS)
        self.writer.flush()

    def _encoder(self, precision: str = "auto") -> Callable[[Sequence[str]], np.ndarray]:
        """What gives texts' embeddings by the weights as they are now."""
        from deploy.python.predictor import make_engine
        from model import encode

        engine = make_engine(self.model, precision if self.args.device == "cpu" else self.args.precision,
                             self.args.cpu_threads)
        return lambda texts: encode(engine, self.tokenizer, texts, self.args.max_seq_length)

    def evaluate(self, step: int, group: str = "eval") -> None:
        """On rank 0, while the others wait."""
        if self.test and self.evaluated != (group, step):
            if self.active:
                measures = self.test(self._encoder())
                console.result(f"global step {step}, " + "whitened, " * (group == "whitened") + ", ".join(
                    f"{name}={value}" for name, value in measures.items()))
                self._scalars(group, measures, step)
                self.measures.update({f"{group}/{name}": None for name in measures})
            self.evaluated = (group, step)
            self.wait()

    def save(self, step: int) -> None:
        """On rank 0, while the others wait."""
        from checkpoint import remove_old
        from loading import save_checkpoint, save_encoder

        if self.saved == step:
            return
        if self.active:
            folder, also = os.path.join(self.args.save_dir, f"model_{step}"), partial(self.write_state, step=step)
            if self.args.objective == "mlm":
                save_encoder(folder, self.model.network, self.tokenizer, also)
            else:
                save_checkpoint(folder, self.model, self.tokenizer, self.record,
                                f"model_state.{self.args.save_format}", also)
            console.log(f"saved {folder}")
            remove_old(self.args.save_dir, step, self.args.keep_checkpoints)
        self.saved = step
        self.wait()

    def whiten(self, step: int, dim: int) -> None:
        """Whiten the network, save it beside the checkpoint of `step`, which stays as it is, and evaluate it. On rank
        0, while the others wait."""
        from loading import make_record, save_checkpoint
        from whitening import SAMPLE, whiten

        if self.active:
            sample = self.texts.sample(SAMPLE)
            whiten(self.model, lambda: self._encoder("fp32")(sample), dim)
            record = make_record(self.model, self.record["model_name_or_path"], self.args.max_seq_length)
            folder = os.path.join(self.args.save_dir, f"model_{step}_whitened")
            save_checkpoint(folder, self.model, self.tokenizer, record, f"model_state.{self.args.save_format}")
            console.log(f"saved {folder}")
        self.evaluate(step, "whitened")

    def finish(self) -> None:
        """Log what there is to say of the whole run: some texts' embeddings, and the hyper-parameters with the final
        measures. On rank 0, while the others wait."""
        if self.active:
            if self.args.visualdl_embeddings:
                sample = self.texts.sample(self.args.visualdl_embeddings)
                self.writer.add_embeddings("texts", mat=self._encoder()(sample).tolist(), metadata=sample)
            if self.measures:
                self.writer.add_hparams({name: value if type(value) in (int, float, str) else str(value) for name, value
                                         in vars(self.args).items() if name not in PLACES}, list(self.measures))
            self.writer.close()
        self.wait()
