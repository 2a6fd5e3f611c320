"""Compute the gradients of a batch: of all its texts at once, or chunk by chunk; on one rank or on several."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from simcse.machine import RANKS

import paddle
from paddle import nn


class Embeddings(NamedTuple):  # a tuple, since DataParallel looks for the tensors of an output in tuples
    """The embeddings of a batch, float32 [texts, embedding_size] each.

    Attributes:
        query, title: row i of `title` is the positive of query i.
        hard_negative: row i is the hard negative of query i; None: there are none.
    """

    query: paddle.Tensor
    title: paddle.Tensor
    hard_negative: paddle.Tensor | None = None

    @classmethod
    def of_sides(cls, sides: Sequence[paddle.Tensor]) -> "Embeddings":
        """Return the embeddings of two or three sides, in the order of `sides`."""
        if len(sides) == 2:
            return cls(query=sides[0], title=sides[1])
        return cls(query=sides[0], title=sides[1], hard_negative=sides[2])

    @property
    def sides(self) -> list[paddle.Tensor]:
        """Queries, titles and, if there are some, negatives."""
        return [self.query, self.title] if self.hard_negative is None else [self.query, self.title, self.hard_negative]

    def map(self, function: Callable[[paddle.Tensor], paddle.Tensor]) -> "Embeddings":
        """Return the embeddings with `function` applied to each side."""
        return Embeddings.of_sides([function(side) for side in self.sides])


class BatchLoss(NamedTuple):
    """The loss of a batch, and what it was computed from; with cross-device negatives the rows of all ranks.

    Attributes:
        value: a scalar.
        embeddings: those compared, without gradients.
        duplicate_keys: a `data.DuplicateKeys` of int64 tensors, of the same rows; None: duplicates are kept as
            negatives.
    """

    value: paddle.Tensor
    embeddings: Embeddings
    duplicate_keys: Any = None


def backward(network: nn.Layer, model: Any, batch: Any, scale_loss: Callable[[paddle.Tensor], paddle.Tensor],
             chunk_size: int | None = None) -> BatchLoss:
    """Add the gradients of a batch's loss to those of the parameters, and return the loss.

    The forward pass of a batch, along which its gradients flow back:

        SimCSE.forward      encodes the sides: `Embeddings` of query, title and hard negative
        SimCSE.loss         with cross-device negatives gathers the rows of all ranks (`ranks.gather_rows`), other
                            ranks' detached; every rank then computes the same loss (`_rank_factor`)
        contrastive_loss    makes them logits: a row for each query, a column for each title, then one for each hard
                            negative

    A hard negative gets gradients from its column in every query's row, except the rows where it is masked as a
    duplicate of that query or its title. With chunks the pass is the same, in two parts; see `_backward_by_chunks`.

    Args:
        network: `model`, or the DataParallel that holds it.
        model: a `SimCSE`.
        batch: a `data.Batch`.
        scale_loss: is applied before the backward pass; see `Trainer.scale_loss`.
        chunk_size: encode so many queries at a time, in the memory of one chunk; None: all at once.
    """
    if chunk_size is None or batch.size <= chunk_size:
        loss = model.loss(network(batch), batch.duplicate_keys)
        scale_loss(loss.value * _rank_factor(model)).backward()
        return loss
    return _backward_by_chunks(network, model, batch, scale_loss, chunk_size)


def _rank_factor(model: Any) -> int:
    """Return RANKS with cross-device negatives, otherwise 1.

    With them the gradient of the common loss is the sum over the ranks, each of which backpropagates through its own
    rows only. DataParallel takes the mean instead, which this factor undoes.
    """
    return RANKS if model.loss_settings.cross_device_negatives else 1


def _backward_by_chunks(network: nn.Layer, model: Any, batch: Any, scale_loss: Callable, chunk_size: int,
                        ) -> BatchLoss:
    """Compute the same gradients with the activations of one chunk at a time (Gao et al. 2021, GradCache,
    arXiv:2101.06983).

    Encode all chunks without a graph, take the gradients of the embeddings, then encode each chunk again, under the
    same dropout, and pass these gradients on to the parameters.
    """
    chunks = batch.chunks(chunk_size)
    random_states = []
    parts = []  # for each chunk, the embeddings of its sides
    with paddle.no_grad():
        for chunk in chunks:
            random_states.append(paddle.get_rng_state())
            parts.append(network(chunk).sides)
    embeddings = Embeddings.of_sides([paddle.concat(parts_of_side) for parts_of_side in zip(*parts)])
    for side in embeddings.sides:
        side.stop_gradient = False
    loss = model.loss(embeddings, batch.duplicate_keys)
    scale_loss(loss.value * _rank_factor(model)).backward()

    start = 0
    for chunk, random_state in zip(chunks, random_states):
        gradients = [side.grad[start : start + chunk.size] for side in embeddings.sides]
        start += chunk.size
        paddle.set_rng_state(random_state)
        # DataParallel exchanges gradients between ranks in the last chunk's backward pass only.
        sync_gradients = network is model or chunk is chunks[-1]
        with contextlib.nullcontext() if sync_gradients else network.no_sync():
            paddle.autograd.backward(network(chunk).sides, gradients)
    return loss
