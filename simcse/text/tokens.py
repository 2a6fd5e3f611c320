"""The token ids of many texts in one array, padded and batched."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Ids = list[int]  # of a text, [CLS] and [SEP] included
WINDOW = 16384  # texts tokenized and sorted by length at a time: enough for batches of even length, in little memory
LENGTH_MULTIPLE = 4  # batches are padded to a multiple of so many tokens, so that kernels are made for few shapes


class Tokens(Sequence):
    """The token ids of texts, [CLS] and [SEP] included, one after the other in `flat`, int32, and how many each text
    has, `lengths`, int64; as a sequence the `Ids` of each text."""

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self.flat, self.lengths, self.ends = flat, lengths, np.cumsum(lengths)
        self.starts = self.ends - lengths

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Tokens":
        """The same of `Ids`, or of what already is `Tokens`."""
        if isinstance(sequences, cls):
            return sequences
        lengths = np.fromiter(map(len, sequences), "int64")
        return cls(np.fromiter(itertools.chain.from_iterable(sequences), "int32", lengths.sum()), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        return self.flat[self.starts[row] : self.ends[row]].tolist()

    def __iter__(self) -> Iterator[Ids]:
        flat = self.flat.tolist()
        return (flat[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist()))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (Tokens, list)) else NotImplemented

    def cut(self, length: int) -> "Tokens":
        """With no more than `length` tokens of each text: its first ones, and its [SEP]."""
        longer = np.flatnonzero(self.lengths > length)
        if not len(longer):
            return self
        kept = np.ones(len(self.flat), bool)
        for start, end in zip((self.starts[longer] + length - 1).tolist(), (self.ends[longer] - 1).tolist()):
            kept[start:end] = False
        return Tokens(self.flat[kept], np.minimum(self.lengths, length))

    def padded(self, rows: Sequence[int], pad_id: int, length: int) -> np.ndarray:
        """Of some texts int64 [rows, length], filled up with `pad_id`."""
        places = np.arange(length)
        inside = places < self.lengths[rows][:, None]
        input_ids = np.full(inside.shape, pad_id, "int64")
        input_ids[inside] = self.flat[(self.starts[rows][:, None] + places)[inside]]
        return input_ids


def pad(sequences: Sequence[Ids], pad_id: int, length: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pad token ids to `length`, or to the longest: input_ids and token_type_ids (all zero), int64 [batch, length]."""
    ids = Tokens.of(sequences)
    input_ids = ids.padded(slice(None), pad_id, length or ids.lengths.max())
    return input_ids, np.zeros_like(input_ids)


def make_batches(ids: Sequence[Ids], pad_id: int, batch_size: int | None = None,
                 batch_tokens: int = 2048) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batch token ids of like length, longest first, each batch padded to a multiple of LENGTH_MULTIPLE, `batch_size`
    texts at a time or, None, as many as fill `batch_tokens`, padding included. Yields the positions of the batch's
    texts in `ids`, its input_ids and its token_type_ids, int64 [texts, length]."""
    ids = Tokens.of(ids)
    order, longest = np.argsort(-ids.lengths, kind="stable"), ids.lengths.max(initial=0)
    while len(order):
        length = int(min(longest, -(-ids.lengths[order[0]] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE))
        size = batch_size or max(1, batch_tokens // length)
        rows, order = order[:size], order[size:]
        input_ids = ids.padded(rows, pad_id, length)
        yield rows.tolist(), input_ids, np.zeros_like(input_ids)
