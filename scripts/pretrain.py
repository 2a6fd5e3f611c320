"""Train an encoder further on texts of its domain, by masked language modelling (Gururangan et al. 2020,
arXiv:2004.10964), before SimCSE.

    python scripts/pretrain.py --device cpu --train_set_file recall/train_unsupervised.csv --save_dir encoder
    python train.py --device cpu --model_name_or_path encoder/model_900 --train_set_file recall/train_unsupervised.csv

Its checkpoints are encoders for train.py's --model_name_or_path. It runs on several processes, stops and resumes as
train.py does.
"""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import data
from simcse import console, flags
from simcse.machine import RANK, RANKS
from simcse.text import textfile, tokens, wordpiece

import numpy as np

# Of the tokens to predict 80 % become [MASK], 10 % another token, and 10 % stay (Devlin et al. 2019).
MASKED = 0.8
RANDOM = 0.1


def parse_args() -> argparse.Namespace:
    parser = flags.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    group = parser.add_argument_group("data")
    group.add_argument("--train_set_file", type=flags.readable_file, required=True, help="training texts, one a line")
    flags.add_data_arguments(group)
    start = parser.add_argument_group("start")
    start.add_argument("--model_name_or_path", type=flags.model_name, default=flags.DEFAULT_MODEL,
                       help="pretrained encoder, hub name or folder")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--mlm_probability", type=flags.fraction, default=0.15,
                              help="fraction of the tokens that are predicted, whole words at a time")
    flags.add_optimization_arguments(optimization)
    flags.add_run_arguments(parser.add_argument_group("device"), parser.add_argument_group("output"))
    return flags.parse_training_arguments(parser)


class MaskedBatch(NamedTuple):
    """The texts of one step.

    Attributes:
        input_ids: int64 [texts, length], masked.
        token_type_ids: int64 [texts, length], all zero.
        positions: int64 [predicted], where the tokens to predict are among all texts * length.
        labels: int64 [predicted], the ids of these tokens.
        rows: the texts' rows in the training file.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    rows: Sequence[int]


def token_starts(encoding: Any) -> list[int]:
    """Return where in its text each token between [CLS] and [SEP] starts."""
    return [start for start, _ in encoding.offsets[1:-1]]


class MaskedBatches:
    """Make batches with whole words masked (Sun et al. 2019, ERNIE, arXiv:1904.09223; Cui et al. 2019,
    arXiv:1906.08101). Words are jieba's.

    Args:
        texts: the training file, a text a row.
        tokenizer: a `WordPiece`.
        args: the flags of this script.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, args: argparse.Namespace) -> None:
        if not isinstance(tokenizer, wordpiece.WordPiece):
            raise console.InputError("--model_name_or_path: the encoder's tokenizer is not ERNIE's or BERT's")
        if "[MASK]" not in tokenizer.vocab:
            raise console.InputError("--model_name_or_path: the encoder's vocabulary has no [MASK]; name another one")
        import jieba

        jieba.setLogLevel(logging.WARNING)
        jieba.initialize()
        self.texts = texts
        self.tokenizer = tokenizer
        self.args = args
        self.jieba = jieba
        self.mask_id = tokenizer.vocab["[MASK]"]
        self.ordinary_ids = np.array([number for token, number in tokenizer.vocab.items()
                                      if not (token.startswith("[") and token.endswith("]"))])

    def words(self, text: str, starts: Sequence[int]) -> np.ndarray:
        """Return the number of the word, from 0, that each token is part of, int64 [tokens].

        Args:
            text: the text.
            starts: where in it each token starts.
        """
        word_starts = [start for _, start, _ in self.jieba.tokenize(text)]
        return np.searchsorted(word_starts, starts, side="right") - 1

    def choose(self, words: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return which tokens of a text to predict, bool [tokens]: those of one word, and of more words while they are
        no more than --mlm_probability of the tokens.

        Args:
            words: the word of each token, int64 [tokens].
            random: draws the words.
        """
        chosen = np.zeros(len(words), bool)
        most = self.args.mlm_probability * len(words)
        for word in random.permutation(np.unique(words)):
            tokens_of_word = words == word
            if not chosen.any() or tokens_of_word.sum() <= most - chosen.sum():
                chosen |= tokens_of_word
        return chosen

    def make(self, rows: Sequence[int], epoch: int) -> MaskedBatch:
        """Return the batch of some rows of the training file. It is a function of seed, epoch and rows, so that a
        resumed run sees what an unbroken one does.

        Args:
            rows: the numbers of the rows.
            epoch: from 0.
        """
        texts = [self.texts[row] for row in rows]
        encodings = self.tokenizer.encode(texts, self.args.max_seq_length)
        input_ids, types = tokens.pad([encoding.ids for encoding in encodings], self.tokenizer.pad_token_id)
        chosen = np.zeros(input_ids.shape, bool)
        for line, (row, text, encoding) in enumerate(zip(rows, texts, encodings)):
            random = np.random.default_rng([self.args.seed, epoch, row])
            starts = token_starts(encoding)
            chosen[line, 1 : 1 + len(starts)] = self.choose(self.words(text, starts), random)
        labels = input_ids[chosen]
        random = np.random.default_rng([self.args.seed, epoch, *rows])
        draw = random.random(len(labels))
        random_ids = random.choice(self.ordinary_ids, len(labels))
        unmasked = np.where(draw < MASKED + RANDOM, random_ids, labels)
        input_ids[chosen] = np.where(draw < MASKED, self.mask_id, unmasked)
        return MaskedBatch(input_ids, types, np.flatnonzero(chosen), labels, rows)


def write_model(folder: str, model: Any, tokenizer: Any) -> None:
    """Write the encoder with its head, and the tokenizer."""
    model.network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(args: argparse.Namespace, texts: textfile.TextFile) -> None:
    """Train an encoder with the head that predicts its tokens.

    Raises:
        Diverged: the loss, or weights, contain NaN or Inf.
        Stopped: a signal has stopped the run, which has saved a checkpoint.
    """
    from simcse.encoder.encoder import check_length, tokenize_rows, warn_unusable
    from simcse.training.masked_lm import load_masked_lm
    from simcse.training.trainer import Trainer

    name = args.resume or args.model_name_or_path
    model = load_masked_lm(name, args.dropout, args.precision)
    tokenizer = wordpiece.load_tokenizer(name)
    check_length(model, args.max_seq_length)
    sample = tokenize_rows(texts.sample_rows(tokens.WINDOW), tokenizer, args.max_seq_length)
    warn_unusable(sample, args.max_seq_length)

    make_batch = MaskedBatches(texts, tokenizer, args).make
    sampler = data.ShuffledBatches(len(texts), args.batch_size, RANK, RANKS)
    trainer = Trainer(args, model, texts, steps_per_epoch=len(sampler),
                      write_model=functools.partial(write_model, model=model, tokenizer=tokenizer))
    batches = data.batches_after(trainer.step, args.epochs, sampler, make_batch)
    run_steps(args, trainer, batches)
    trainer.finish(flags.hyper_parameters(args))


def run_steps(args: argparse.Namespace, trainer: Any, batches: Iterable[MaskedBatch]) -> None:
    """Take all steps that are left, and save a checkpoint every --save_steps and after the last step.

    Args:
        args: the flags.
        trainer: the run.
        batches: one for each step.

    Raises:
        Diverged: the loss, or weights, contain NaN or Inf. If only the loss does, the weights are saved.
        Stopped: a signal has stopped the run, after a checkpoint.
    """
    from simcse.training.trainer import LOG_STEPS

    with console.progress("training", trainer.total_steps, "steps", lines=False, done=trainer.step) as advance:
        for step, batch in enumerate(batches, start=trainer.step + 1):
            saves = step % args.save_steps == 0

            trainer.start_step()
            loss = trainer.network(batch)
            trainer.scale_loss(loss).backward()
            trainer.update(loss, batch, check_loss=saves)  # if the loss is NaN or Inf: saves, raises Diverged
            advance()
            if step % LOG_STEPS == 0 or step == trainer.total_steps:
                trainer.log_step(loss)
            if saves:
                trainer.save()
            if trainer.stop_requested():
                break
    trainer.save()  # the last step, whether a signal or --epochs has ended the loop
    trainer.finish_signal_handling()


def main() -> None:
    args = parse_args()
    texts = textfile.TextFile(args.train_set_file, "--train_set_file")

    args = flags.resolve_training(args)
    flags.announce_training(args, args.model_name_or_path, console.count(len(texts), "training text"))

    from simcse.training.trainer import run_training

    run_training(args, lambda: train(args, texts))


if __name__ == "__main__":
    console.run(main)
