"""Text files, tokens and batches: what goes into the network. paddlenlp is imported by `load_tokenizer` alone."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
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


def text_keys(sides: Sequence[Sequence[Ids]]) -> np.ndarray:
    """A number for each text's token ids, the same for the same ids in every process: int64 [texts, sides]."""
    return np.array([[hash(tuple(ids)) for ids in texts] for texts in zip(*sides)])  # of numbers it is no random one


INPUTS = ("query_input_ids", "query_token_type_ids", "title_input_ids", "title_token_type_ids")  # of SimCSE.forward


class Batch(NamedTuple):
    """The texts of one step: what the network is given of them at a time, in one chunk or with --chunk_size in several;
    the keys of `model.same_texts`, without which equal texts are each other's negatives; rows of the training file."""

    chunks: list[dict[str, np.ndarray]]
    keys: np.ndarray | None = None
    rows: Sequence[int] = ()


def crop(ids: Ids, rate: float, random: np.random.Generator, most: int = WHOLE) -> Ids:
    """A run of the tokens, `rate` of them less at most (independent cropping; Izacard et al. 2022, Contriever,
    arXiv:2112.09118), cut to `most` with [CLS] and [SEP]."""
    inner = len(ids) - 2
    length = random.integers(inner - int(rate * inner), inner + 1)
    start = 1 + random.integers(0, inner - length + 1)
    return [ids[0], *ids[start : start + min(length, most - 2)], ids[-1]]


def chunks_of(sides: list[list[Ids]], size: int, pad_id: int) -> list[dict[str, np.ndarray]]:
    """The queries and their titles, then hard negatives, `size` of each at a time, as INPUTS."""
    chunks = []
    for start in range(0, len(sides[0]), size):
        query, *others = (side[start : start + size] for side in sides)
        chunks.append(dict(zip(INPUTS, (*pad(query, pad_id), *pad(list(itertools.chain(*others)), pad_id)))))
    return chunks


def make_batch(texts: Sequence[Any], tokenizer: Any, args: argparse.Namespace, rows: Sequence[int],
               epoch: int) -> Batch:
    """The batch of some rows of the training file, a text a row or a list of two or three, in an epoch from 0. What is
    random in it is a function of seed, epoch and row, so that a resumed run, or one of several processes, sees what an
    unbroken one does."""
    taken = [texts[row] for row in rows]
    columns = [taken] if isinstance(taken[0], str) else zip(*taken)
    most = max(args.max_seq_length, WHOLE) if args.crop_rate else args.max_seq_length
    own = [tokenizer(column, most) for column in columns]  # as they are in the file
    sides = own if len(own) > 1 else own * 2
    if args.crop_rate:
        sides = [[crop(ids, args.crop_rate, np.random.default_rng([args.seed, epoch, row, side]), args.max_seq_length)
                  for ids, row in zip(each, rows)] for side, each in enumerate(sides)]
    chunks = chunks_of(sides, args.chunk_size or len(rows), tokenizer.pad_token_id)
    return Batch(chunks, None if args.keep_duplicate_negatives else text_keys(own), rows)


def batches_after(step: int, epochs: int, sampler: ShuffledBatches,
                  make: Callable[[Sequence[int], int], Batch]) -> Iterator[tuple[int, int, Batch]]:
    """Yield, for every step after `step`, its epoch and its place in it, both from 1, and its batch, which `make` gives
    of some rows in an epoch from 0; the next batch is made while a step runs."""
    for epoch in range(step // len(sampler), epochs):
        first = max(0, step - epoch * len(sampler))
        made = prefetch(make(rows, epoch) for rows in sampler.epoch(epoch, first))
        for number, batch in enumerate(made, start=first + 1):
            yield epoch + 1, number, batch
