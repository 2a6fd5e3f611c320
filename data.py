"""Make the batches of training: from rows of the training file to token ids."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from simcse.files import prefetch
from simcse.text.prefixes import DOCUMENT, NO_PREFIXES, QUERY, Prefixes, add_prefixes
from simcse.text.tokens import Ids, Tokens, pad

import numpy as np

Item = TypeVar("Item")  # a Batch, or one of another loss
UNCROPPED_LENGTH = 512  # tokens of a text, at most, that views are cropped from


class ShuffledBatches:
    """The rows of each batch of one rank, reshuffled in every epoch.

    The order is that of paddle.io.DistributedBatchSampler(shuffle=True), and takes 4 bytes of memory per text. All
    ranks together take every text once; the first rows of the file are repeated so that all ranks get equally many. A
    last batch of a single text, which would have no negatives, is joined to the one before.

    Args:
        count: texts of the training file.
        batch_size: texts of a batch of one rank.
        rank: the number of this one.
        ranks: how many there are.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> None:
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        self.rows_per_rank = math.ceil(count / ranks)

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        batches = math.ceil(self.rows_per_rank / self.batch_size)
        last_is_single = self.rows_per_rank % self.batch_size == 1
        if last_is_single and batches > 1 and self.batch_size > 1:
            return batches - 1
        return batches

    def epoch(self, number: int, first: int = 0) -> Iterator[np.ndarray]:
        """Yield the row numbers of each batch, int32 [texts].

        Args:
            number: the epoch, from 0.
            first: batches to leave out.
        """
        # All texts, then the first ones again: np.resize repeats an array until it has the size.
        order = np.resize(np.arange(self.count, dtype="int32"), self.rows_per_rank * self.ranks)
        np.random.RandomState(number).shuffle(order)
        size = self.batch_size * self.ranks  # texts of a batch of all ranks together
        for batch in range(first, len(self)):
            is_last = batch == len(self) - 1
            rows = order[batch * size :] if is_last else order[batch * size : (batch + 1) * size]
            share = len(rows) // self.ranks
            yield rows[self.rank * share : (self.rank + 1) * share]


class TokenizedSide(NamedTuple):
    """The token ids of the texts of one side of a batch: its queries, its titles or its hard negatives.

    Attributes:
        ids: those of each text, with [CLS], its prefix and [SEP].
        prefix_tokens: int64 [texts], how many of them are its prefix.
    """

    ids: Sequence[Ids]
    prefix_tokens: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], max_seq_length: int, prefixes: Prefixes,
           input_type: str) -> "TokenizedSide":
        """Tokenize texts of one input type."""
        prefixed = add_prefixes(tokenizer, texts, prefixes, input_type)
        ids = tokenizer(prefixed.texts, max_seq_length)
        return cls(ids, prefixed.count_prefix_tokens(Tokens.of(ids)))

    def keys(self, length: int) -> np.ndarray:
        """Return the key of the first `length` tokens of each text, without prefix, [CLS] and [SEP], int64 [texts]."""
        texts = []
        for text_ids, prefix_tokens in zip(self.ids, self.prefix_tokens.tolist()):
            texts.append(text_ids[1 + prefix_tokens : -1][:length])
        return hash_token_ids(texts)


def hash_token_ids(ids: Sequence[Ids]) -> np.ndarray:
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
        input_ids, token_type_ids = pad(ids, pad_id)
        return cls(input_ids, token_type_ids)

    def part(self, start: int, end: int) -> "Inputs":
        """Return the inputs of the texts from `start` up to, not including, `end`."""
        types = self.token_type_ids
        return Inputs(self.input_ids[start:end], None if types is None else types[start:end])


class DuplicateKeys(NamedTuple):
    """Numbers by which the loss finds the same text again in a batch: equal texts have equal numbers.

    Attributes:
        query, title: int64 [texts].
        hard_negative: int64 [texts]; None: the batch has no hard negatives.
    """

    query: np.ndarray
    title: np.ndarray
    hard_negative: np.ndarray | None = None

    def map(self, function: Callable[[Any], Any]) -> "DuplicateKeys":
        """Return the keys with `function` applied to each side that there is."""
        hard_negative = None if self.hard_negative is None else function(self.hard_negative)
        return DuplicateKeys(query=function(self.query), title=function(self.title), hard_negative=hard_negative)


@dataclass(frozen=True)
class Batch:
    """The texts of one step. Row i of `title` is the positive of query i, row i of `hard_negative` its hard negative.

    `gradients.backward` takes it from here, through the network to the loss and back.

    Attributes:
        query: in SimCSE the texts.
        title: in SimCSE the same texts, which dropout or cropping makes a second view of.
        hard_negative: None: no hard negatives.
        duplicate_keys: None: duplicates in the batch are kept as negatives.
        rows: numbers of the texts' rows in the training file.
    """

    query: Inputs
    title: Inputs
    hard_negative: Inputs | None = None
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
            hard_negative = None if self.hard_negative is None else self.hard_negative.part(start, end)
            chunks.append(Batch(query=self.query.part(start, end), title=self.title.part(start, end),
                                hard_negative=hard_negative, rows=self.rows[start:end]))
        return chunks


def crop(ids: Ids, rate: float, random: np.random.Generator, max_seq_length: int = UNCROPPED_LENGTH,
         prefix_tokens: int = 0) -> Ids:
    """Return a view of a text: a random run of its tokens (independent cropping; Izacard et al. 2022, Contriever,
    arXiv:2112.09118).

    Args:
        ids: the text's token ids, with [CLS], its prefix and [SEP].
        rate: the largest fraction of the tokens to drop.
        random: draws length and start of the run.
        max_seq_length: tokens of the view at most, with [CLS], prefix and [SEP]; the run is cut.
        prefix_tokens: how many tokens the prefix has, which is not cropped.
    """
    first = 1 + prefix_tokens
    count = len(ids) - 1 - first
    length = random.integers(count - int(rate * count), count + 1)
    start = first + random.integers(0, count - length + 1)
    end = start + min(length, max_seq_length - 1 - first)
    return [*ids[:first], *ids[start:end], ids[-1]]


def make_batch(texts: Sequence[Any], tokenizer: Any, args: argparse.Namespace, rows: Sequence[int],
               epoch: int, prefixes: Prefixes = NO_PREFIXES) -> Batch:
    """Return the batch of some rows of the training file.

    Args:
        texts: the training file, whose rows are a text, (query, title) or (query, title, hard negative).
        tokenizer: see `wordpiece.load_tokenizer`.
        args: flags of train.py.
        rows: the numbers of the rows.
        epoch: from 0.
        prefixes: of queries, and of documents, which are titles and hard negatives.
    """
    contents = [texts[row] for row in rows]
    if isinstance(contents[0], str):
        return make_text_batch(contents, tokenizer, args, rows=rows, epoch=epoch, prefixes=prefixes)
    sides = []
    for column, input_type in enumerate((QUERY, DOCUMENT, DOCUMENT)[: len(contents[0])]):
        column_texts = [fields[column] for fields in contents]
        sides.append(TokenizedSide.of(tokenizer, column_texts, args.max_seq_length, prefixes, input_type))
    query, title, *hard_negatives = sides
    hard_negative = hard_negatives[0] if hard_negatives else None
    duplicate_keys = None
    if not args.keep_duplicate_negatives:
        length = common_length(sides, args.max_seq_length)
        duplicate_keys = DuplicateKeys(query=query.keys(length), title=title.keys(length),
                                       hard_negative=None if hard_negative is None else hard_negative.keys(length))
    pad_id = tokenizer.pad_token_id
    return Batch(query=Inputs.of(query.ids, pad_id), title=Inputs.of(title.ids, pad_id),
                 hard_negative=None if hard_negative is None else Inputs.of(hard_negative.ids, pad_id),
                 duplicate_keys=duplicate_keys, rows=rows)


def make_text_batch(texts: Sequence[str], tokenizer: Any, args: argparse.Namespace, *, rows: Sequence[int],
                    epoch: int, prefixes: Prefixes = NO_PREFIXES) -> Batch:
    """Return the batch of texts without titles: the title of a text is the text itself, or another crop of it.

    One view of a text is a query, the other one a document, each with its prefix.

    Args:
        texts: those of the batch.
        rows: their numbers in the training file; the others as in `make_batch`.
    """
    length = max(args.max_seq_length, UNCROPPED_LENGTH) if args.crop_rate else args.max_seq_length
    query = TokenizedSide.of(tokenizer, texts, length, prefixes, QUERY)
    title = query
    if prefixes.document != prefixes.query:
        title = TokenizedSide.of(tokenizer, texts, length, prefixes, DOCUMENT)
    duplicate_keys = None
    if not args.keep_duplicate_negatives:
        keys = query.keys(common_length([query, title], length))
        duplicate_keys = DuplicateKeys(query=keys, title=keys)
    query_ids = query.ids
    title_ids = title.ids
    if args.crop_rate:
        query_ids = crop_view(query, 0, args, rows=rows, epoch=epoch)
        title_ids = crop_view(title, 1, args, rows=rows, epoch=epoch)
    pad_id = tokenizer.pad_token_id
    return Batch(query=Inputs.of(query_ids, pad_id), title=Inputs.of(title_ids, pad_id),
                 duplicate_keys=duplicate_keys, rows=rows)


def common_length(sides: Sequence[TokenizedSide], max_seq_length: int) -> int:
    """Return how many tokens of a text all sides have at most, [CLS], [SEP] and the longest prefix left out.

    By so many tokens the same text is found again on any side, although it may be cut at different places.
    """
    return max_seq_length - 2 - max(int(side.prefix_tokens.max()) for side in sides)


def crop_view(side: TokenizedSide, view: int, args: argparse.Namespace, *, rows: Sequence[int],
              epoch: int) -> list[Ids]:
    """Return a crop of each text.

    It is a function of seed, epoch, row and view, so that a resumed run, or one of several processes, sees what an
    unbroken one does.

    Args:
        side: the texts.
        view: 0 for the queries, 1 for the titles.
        rows: the texts' rows in the training file.
        epoch: from 0.
    """
    cropped = []
    for row, text_ids, prefix_tokens in zip(rows, side.ids, side.prefix_tokens.tolist()):
        random = np.random.default_rng([args.seed, epoch, row, view])
        cropped.append(crop(text_ids, args.crop_rate, random, args.max_seq_length, prefix_tokens))
    return cropped


def batches_after(step: int, epochs: int, sampler: ShuffledBatches,
                  make: Callable[[Sequence[int], int], Item]) -> Iterator[Item]:
    """Yield the batch of every step that is left, while a thread makes the next one.

    Args:
        step: steps that are done.
        epochs: of the whole run.
        sampler: gives the rows of each batch.
        make: returns the batch of some rows in an epoch, which counts from 0.
    """
    first_epoch, first_batch = divmod(step, len(sampler))
    for epoch in range(first_epoch, epochs):
        rows_of_batches = sampler.epoch(epoch, first_batch if epoch == first_epoch else 0)
        yield from prefetch(make(rows, epoch) for rows in rows_of_batches)
