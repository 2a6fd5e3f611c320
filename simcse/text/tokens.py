"""Hold the token ids of many texts in one array, pad them and make batches of them."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Ids = list[int]  # the token ids of one text, [CLS] and [SEP] included
WINDOW = 16384  # texts tokenized and sorted by length at a time: enough for batches of even length, in little memory
LENGTH_MULTIPLE = 4  # the length of a batch is a multiple of this: kernels are compiled for few shapes


class Tokens(Sequence):
    """A sequence of the token ids of each text, [CLS] and [SEP] included, kept in one array.

    Attributes:
        flat: int32 [tokens], the ids of all texts.
        lengths: int64 [texts], how many ids each text has.
        starts, ends: int64 [texts], where the ids of each text begin and end in `flat`.
    """

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self.flat = flat
        self.lengths = lengths
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Tokens":
        """Return lists of token ids as `Tokens`; `Tokens` are returned as they are."""
        if isinstance(sequences, cls):
            return sequences
        lengths = np.fromiter(map(len, sequences), "int64")
        flat = np.fromiter(itertools.chain.from_iterable(sequences), "int32", lengths.sum())
        return cls(flat, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row):
        """Return the ids of a text, or a list with those of each text of a slice."""
        if isinstance(row, slice):
            return [self[number] for number in range(len(self))[row]]
        return self.flat[self.starts[row] : self.ends[row]].tolist()

    def __iter__(self) -> Iterator[Ids]:
        flat = self.flat.tolist()  # at once: slices of a list are faster than slices of an array
        for start, end in zip(self.starts.tolist(), self.ends.tolist()):
            yield flat[start:end]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Tokens, list)):
            return NotImplemented
        return list(self) == list(other)

    def truncate(self, length: int) -> "Tokens":
        """Return the texts with at most `length` tokens each: of a longer one the first tokens and [SEP]."""
        longer = np.flatnonzero(self.lengths > length)
        if not len(longer):
            return self
        is_kept = np.ones(len(self.flat), bool)
        first_removed = self.starts[longer] + length - 1
        separators = self.ends[longer] - 1
        for start, end in zip(first_removed.tolist(), separators.tolist()):
            is_kept[start:end] = False
        return Tokens(self.flat[is_kept], np.minimum(self.lengths, length))

    def pad(self, rows: Sequence[int] | slice, pad_id: int, length: int) -> np.ndarray:
        """Return the ids of some texts, padded with `pad_id` to `length`: int64 [rows, length]."""
        positions = np.arange(length)
        is_token = positions < self.lengths[rows][:, None]  # [rows, length]
        places = self.starts[rows][:, None] + positions  # in `flat`
        input_ids = np.full(is_token.shape, pad_id, "int64")
        input_ids[is_token] = self.flat[places[is_token]]
        return input_ids


def pad(sequences: Sequence[Ids], pad_id: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pad the token ids of texts to `length`, or if it is 0 to the longest text.

    Returns:
        input_ids and token_type_ids, which are all zero: int64 [texts, length].
    """
    ids = Tokens.of(sequences)
    input_ids = ids.pad(slice(None), pad_id, length or ids.lengths.max())
    return input_ids, np.zeros_like(input_ids)


class TokenBatch(NamedTuple):
    """Texts that are encoded together.

    Attributes:
        rows: the numbers of the texts, from 0.
        input_ids: int64 [texts, length].
        token_type_ids: int64 [texts, length], all zero.
    """

    rows: list[int]
    input_ids: np.ndarray
    token_type_ids: np.ndarray


def make_batches(ids: Sequence[Ids], pad_id: int, batch_size: int | None = None,
                 batch_tokens: int = 2048) -> Iterator[TokenBatch]:
    """Yield batches of texts of similar length, the longest first, each padded to a multiple of LENGTH_MULTIPLE.

    Args:
        ids: the token ids of each text.
        pad_id: the id of [PAD].
        batch_size: texts per batch; None: as many as fit in `batch_tokens`.
        batch_tokens: tokens per batch, padding included; a longer text is a batch of its own.
    """
    ids = Tokens.of(ids)
    remaining = np.argsort(-ids.lengths, kind="stable")
    longest = ids.lengths.max(initial=0)
    while len(remaining):
        multiples = math.ceil(ids.lengths[remaining[0]] / LENGTH_MULTIPLE)
        length = int(min(longest, multiples * LENGTH_MULTIPLE))
        size = batch_size or max(1, batch_tokens // length)
        rows = remaining[:size]
        remaining = remaining[size:]
        input_ids = ids.pad(rows, pad_id, length)
        yield TokenBatch(rows.tolist(), input_ids, np.zeros_like(input_ids))
