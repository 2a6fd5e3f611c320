"""Batches of few shapes, for a runtime that prepares kernels for each shape that it meets."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from simcse.text.tokens import Ids, Tokens

import numpy as np

MAX_BYTES = 2 << 30  # of the copies of the weights that oneDNN keeps, one for each shape


class BatchShapes(NamedTuple):
    """The shapes that batches may have: each of `sizes` by each of `lengths`.

    Attributes:
        sizes: texts of a batch, rising, the first 1.
        lengths: tokens of a text, rising, the last the longest that a text may be.
    """

    sizes: Sequence[int]
    lengths: Sequence[int]

    def all(self) -> list[tuple[int, int]]:
        """Return the size and the length of every shape."""
        return list(itertools.product(self.sizes, self.lengths))

    def make_batches(self, ids: Sequence[Ids], pad_id: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Batch token ids, longest first.

        A batch that is two thirds full is filled up with its last text.

        Yields:
            rows: the positions in `ids` of the batch's texts, without those that fill it up.
            input_ids, token_type_ids: int64 [size, length].
        """
        ids = Tokens.of(ids)
        order = np.argsort(-ids.lengths, kind="stable").tolist()
        start = 0
        while start < len(order):
            left = len(order) - start
            size = max(size for size in self.sizes if size <= max(1, 1.5 * left))
            rows = order[start : start + size]
            length = min(length for length in self.lengths if length >= ids.lengths[rows[0]])
            filled = rows + [rows[-1]] * (size - len(rows))
            input_ids = ids.pad(filled, pad_id, length)
            yield rows, input_ids, np.zeros_like(input_ids)
            start += size


def choose_shapes(weights: int, max_seq_length: int) -> BatchShapes:
    """Return a fine grid of shapes, or a coarse one for a large model.

    Args:
        weights: bytes of the model's weights.
    """
    powers = []  # of two
    length = 8
    while length < max_seq_length:
        powers.append(length)
        length *= 2
    between = [length * 3 // 2 for length in powers if length * 3 // 2 < max_seq_length]
    fine = BatchShapes([1, 2, 4, 8, 16], [*sorted(powers + between), max_seq_length])
    coarse = BatchShapes([1, 4, 16], [*powers[1:], max_seq_length])
    return fine if len(fine.all()) * weights <= MAX_BYTES else coarse
