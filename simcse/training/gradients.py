"""The gradients of a batch: at once, or by a cache in the memory of a chunk; of one rank or of several."""

import contextlib
from collections.abc import Callable
from typing import Any

from simcse.machine import RANKS

import paddle
from paddle import nn


def backward(network: nn.Layer, model: Any, batch: Any, scale_loss: Callable) -> paddle.Tensor:
    """The loss of a batch, a scalar; its gradients are added to those of the parameters.

    A batch of several chunks takes the memory of one (Gao et al. 2021, GradCache, arXiv:2101.06983): all are encoded
    without a graph, the loss gives the gradients of the embeddings, and each chunk is encoded again, its dropout
    replayed, to pass them on to the parameters. `network` is `model`, a `SimCSE`, or the DataParallel that holds it;
    `batch` a `data.Batch`; `scale_loss` scales the loss before its gradients are taken."""
    # Ranks take the mean of their gradients; of a loss over all ranks' rows each rank has but its own rows' part.
    share = RANKS if model.cross_device_negatives else 1
    chunks = batch.chunks
    keys = None if batch.keys is None else paddle.to_tensor(batch.keys)
    if len(chunks) == 1:
        loss = network(**chunks[0], keys=keys)
        scale_loss(loss * share).backward()
        return loss
    states, embeddings = [], []
    with paddle.no_grad():
        for chunk in chunks:
            states.append(paddle.get_rng_state())
            embeddings.append(network(**chunk, embeddings_only=True))
    sides = [paddle.concat(side) for side in zip(*embeddings)]
    for side in sides:
        side.stop_gradient = False
    loss = model.loss(*sides[:2], keys, *sides[2:])
    scale_loss(loss * share).backward()
    sizes = [len(query) for query, *_ in embeddings]
    gradients = zip(*(side.grad.detach().split(sizes) for side in sides))
    for chunk, state, gradient in zip(chunks, states, gradients):
        paddle.set_rng_state(state)
        ranks_wait = network is model or chunk is chunks[-1]  # DataParallel exchanges gradients with the last chunk
        with contextlib.nullcontext() if ranks_wait else network.no_sync():
            parts = network(**chunk, embeddings_only=True)
            sum((part * each).sum() for part, each in zip(parts, gradient)).backward()
    return loss
