"""The gradients of a batch: of all its texts at once, or of a chunk of them at a time; on one rank or on several."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from simcse.machine import RANKS

import paddle
from paddle import nn


class Embeddings(NamedTuple):  # a tuple, since DataParallel looks for the tensors of an output in tuples
    """The embeddings of a batch, float32 [texts, embedding_size] each.

    Attributes:
        query, title: row i of `title` is the positive of query i.
        negative: row i is the hard negative of query i; None: there are none.
    """

    query: paddle.Tensor
    title: paddle.Tensor
    negative: paddle.Tensor | None = None

    @property
    def sides(self) -> list[paddle.Tensor]:
        """Those that there are."""
        return [side for side in self if side is not None]

    def map(self, function: Callable[[paddle.Tensor], paddle.Tensor]) -> "Embeddings":
        """Return the embeddings with `function` applied to each side that there is."""
        return Embeddings(*[None if side is None else function(side) for side in self])


def backward(network: nn.Layer, model: Any, batch: Any, scale_loss: Callable[[paddle.Tensor], paddle.Tensor],
             chunk_size: int | None = None) -> paddle.Tensor:
    """Add the gradients of a batch's loss to those of the parameters, and return the loss, a scalar.

    Args:
        network: `model`, or the DataParallel that holds it.
        model: a `SimCSE`.
        batch: a `data.Batch`.
        scale_loss: scales the loss before its gradients are taken.
        chunk_size: encode so many queries at a time, in the memory of one chunk; None: all at once.
    """
    if chunk_size is None or batch.size <= chunk_size:
        loss = model.loss(network(batch), batch.duplicate_keys)
        scale_loss(loss * _ranks_in_loss(model)).backward()
        return loss
    return _backward_by_chunks(network, model, batch, scale_loss, chunk_size)


def _ranks_in_loss(model: Any) -> int:
    """Return how many ranks the loss is over. DataParallel takes the mean of the ranks' gradients; of a loss over all
    ranks' embeddings each rank has only the part of its own, so that their sum is wanted."""
    return RANKS if model.loss_settings.cross_device_negatives else 1


def _backward_by_chunks(network: nn.Layer, model: Any, batch: Any, scale_loss: Callable, chunk_size: int,
                        ) -> paddle.Tensor:
    """Do what `backward` does in the memory of a chunk (Gao et al. 2021, GradCache, arXiv:2101.06983): encode all
    chunks without a graph, take the gradients of the embeddings, then encode each chunk again, under the same dropout,
    and pass these gradients on to the parameters."""
    chunks = batch.chunks(chunk_size)
    random_states, parts = [], []
    with paddle.no_grad():
        for chunk in chunks:
            random_states.append(paddle.get_rng_state())
            parts.append(network(chunk).sides)
    embeddings = Embeddings(*[paddle.concat(side) for side in zip(*parts)])
    for side in embeddings.sides:
        side.stop_gradient = False
    loss = model.loss(embeddings, batch.duplicate_keys)
    scale_loss(loss * _ranks_in_loss(model)).backward()

    start = 0
    for chunk, random_state in zip(chunks, random_states):
        gradients = [side.grad[start : start + chunk.size] for side in embeddings.sides]
        start += chunk.size
        paddle.set_rng_state(random_state)
        # DataParallel exchanges gradients between ranks in the last chunk's backward pass only.
        exchanges = network is model or chunk is chunks[-1]
        with contextlib.nullcontext() if exchanges else network.no_sync():
            paddle.autograd.backward(network(chunk).sides, gradients)
    return loss
