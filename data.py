"""Text files, tokens and batches: what goes into the network. paddlenlp is imported by `load_tokenizer` alone."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from simcse.files import prefetch
from simcse.text.tokens import Ids, pad

import numpy as np

WHOLE = 512  # tokens of a text that views are cropped from


class ShuffledBatches:
    """The batches of `batch_size` of `count` texts for one rank of several: the order of
    paddle.io.DistributedBatchSampler(shuffle=True), for 4 bytes of memory a text. All ranks together take every text
    once, and the first ones again where the ranks would not have as many each. A last batch of a single text, which
    would have no negatives, is joined to the one before."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.count, self.batch_size, self.rank, self.ranks = count, batch_size, rank, ranks

    def __len__(self) -> int:
        """Batches of an epoch."""
        texts = -(-self.count // self.ranks)
        return -(-texts // self.batch_size) - (1 < self.batch_size < texts and texts % self.batch_size == 1)

    def epoch(self, number: int, first: int = 0) -> Iterator[np.ndarray]:
        """Yield the row numbers, int32 [batch], of an epoch, from 0, without its `first` batches."""
        order = np.resize(np.arange(self.count, dtype="int32"), -(-self.count // self.ranks) * self.ranks)
        np.random.RandomState(number).shuffle(order)
        size, last = self.batch_size * self.ranks, len(self) - 1
        for batch in range(first, len(self)):
            yield np.split(order[batch * size : (batch + 1) * size if batch < last else None], self.ranks)[self.rank]


def text_keys(ids: Sequence[Ids]) -> np.ndarray:
    """Return a number for each text, int64 [texts]: the same for the same token ids, in every process."""
    return np.array([hash(tuple(text_ids)) for text_ids in ids])  # Python salts the hashes of strings, not of numbers


class Inputs(NamedTuple):
    """The texts of one side of a batch, as the encoder takes them.

    Attributes:
        input_ids: int64 [texts, length], padded.
        token_type_ids: int64 [texts, length]; None: all zero.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None = None

    @classmethod
    def of(cls, ids: Sequence[Ids], pad_id: int) -> "Inputs":
        """Return the inputs of texts by their token ids."""
        return cls(*pad(ids, pad_id))

    def rows(self, start: int, end: int) -> "Inputs":
        """Return the inputs of the texts from `start` up to, not including, `end`."""
        types = self.token_type_ids
        return Inputs(self.input_ids[start:end], None if types is None else types[start:end])


class DuplicateKeys(NamedTuple):
    """Numbers by which the loss finds the same text again in a batch: equal texts have equal numbers.

    Attributes:
        query, title: int64 [texts].
        negative: int64 [texts]; None: the batch has no hard negatives.
    """

    query: np.ndarray
    title: np.ndarray
    negative: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """The texts of one step. Row i of `title` is the positive of query i, row i of `negative` its hard negative.

    Attributes:
        query: in SimCSE the texts.
        title: in SimCSE the same texts, which dropout or cropping makes a second view of.
        negative: None: no hard negatives.
        duplicate_keys: None: the same text twice in the batch is its own negative.
        rows: numbers of the texts' rows in the training file.
    """

    query: Inputs
    title: Inputs
    negative: Inputs | None = None
    duplicate_keys: DuplicateKeys | None = None
    rows: Sequence[int] = ()

    @property
    def size(self) -> int:
        """Queries of the batch."""
        return len(self.query.input_ids)

    def chunks(self, size: int) -> list["Batch"]:
        """Return the batch in parts of `size` queries, with their titles and hard negatives; without keys, which are
        of the whole batch."""
        chunks = []
        for start in range(0, self.size, size):
            end = start + size
            negative = None if self.negative is None else self.negative.rows(start, end)
            chunks.append(Batch(self.query.rows(start, end), self.title.rows(start, end), negative,
                                rows=self.rows[start:end]))
        return chunks


def crop(ids: Ids, rate: float, random: np.random.Generator, most: int = WHOLE) -> Ids:
    """A run of the tokens, `rate` of them less at most (independent cropping; Izacard et al. 2022, Contriever,
    arXiv:2112.09118), cut to `most` with [CLS] and [SEP]."""
    inner = len(ids) - 2
    length = random.integers(inner - int(rate * inner), inner + 1)
    start = 1 + random.integers(0, inner - length + 1)
    return [ids[0], *ids[start : start + min(length, most - 2)], ids[-1]]


def make_batch(texts: Sequence[Any], tokenizer: Any, args: argparse.Namespace, rows: Sequence[int],
               epoch: int) -> Batch:
    """The batch of some rows of the training file, a text a row or a list of two or three, in an epoch from 0. What is
    random in it is a function of seed, epoch and row, so that a resumed run, or one of several processes, sees what an
    unbroken one does."""
    taken = [texts[row] for row in rows]
    columns = [taken] if isinstance(taken[0], str) else zip(*taken)
    most = max(args.max_seq_length, WHOLE) if args.crop_rate else args.max_seq_length
    sides = [tokenizer(column, most) for column in columns]  # as they are in the file
    if len(sides) == 1:
        sides = sides * 2
    keys = None if args.keep_duplicate_negatives else DuplicateKeys(*map(text_keys, sides))
    if args.crop_rate:
        sides = [[crop(ids, args.crop_rate, np.random.default_rng([args.seed, epoch, row, side]), args.max_seq_length)
                  for ids, row in zip(each, rows)] for side, each in enumerate(sides)]
    inputs = [Inputs.of(ids, tokenizer.pad_token_id) for ids in sides]
    return Batch(*inputs, duplicate_keys=keys, rows=rows)


def batches_after(step: int, epochs: int, sampler: ShuffledBatches,
                  make: Callable[[Sequence[int], int], Batch]) -> Iterator[tuple[int, int, Batch]]:
    """Yield, for every step after `step`, its epoch and its place in it, both from 1, and its batch, which `make` gives
    of some rows in an epoch from 0; the next batch is made while a step runs."""
    for epoch in range(step // len(sampler), epochs):
        first = max(0, step - epoch * len(sampler))
        made = prefetch(make(rows, epoch) for rows in sampler.epoch(epoch, first))
        for number, batch in enumerate(made, start=first + 1):
            yield epoch + 1, number, batch
