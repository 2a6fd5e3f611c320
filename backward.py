"""The gradients of a batch: at once, by a cache in the memory of a chunk, on several ranks; and faster on a CPU."""

import contextlib
import ctypes
from collections.abc import Callable

import paddle
from paddle.nn import Linear
from paddle.nn.functional import linear

from batches import Batch


def backward(network, model, batch: Batch, weigh: Callable, last: bool):
    """The loss of a batch, its gradients added to the parameters'; of one chunk at once, of several by their cache.

    Args:
        network: `model`, or the DataParallel that holds it.
        weigh: scales the loss before its gradients are taken.
        last: ranks exchange their gradients now.
    """
    # Ranks take the mean of their gradients; of a loss over all ranks' rows each rank has but its own rows' part.
    share = paddle.distributed.get_world_size() if model.cross_device_negatives else 1
    chunks = [tuple(map(paddle.to_tensor, chunk)) for chunk in batch.chunks]
    about = {name: paddle.to_tensor(rows) for name, rows in (("keys", batch.keys), ("teacher", batch.teacher))
             if rows is not None}

    def exchange(now: bool):
        return contextlib.nullcontext() if network is model or now and not model.recomputes else network.no_sync()

    if len(chunks) == 1:
        with exchange(last):
            loss = network(*model.inputs(chunks[0]), **about)
            weigh(loss * share).backward()
    else:
        loss = cached_backward(network, model, chunks, about, lambda loss: weigh(loss * share), exchange, last)
    if last and model.recomputes and network is not model:  # DataParallel cannot follow a layer computed again
        from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

        fused_allreduce_gradients(list(model.parameters()), None)
    return loss


def cached_backward(network, model, chunks: list[tuple], about: dict, weigh: Callable, exchange: Callable, last: bool):
    """Gradients of a batch in the memory of a chunk (Gao et al. 2021, GradCache, arXiv:2101.06983).

    All chunks are encoded without a graph, the loss gives the gradients of the embeddings, and each chunk is encoded
    again, its dropout replayed, to pass them on to the parameters.
    """
    def sides_of(chunk: tuple) -> tuple:
        return network(*model.inputs(chunk), embeddings_only=True)

    states, embeddings = [], []
    with paddle.no_grad():
        for chunk in chunks:
            states.append(paddle.get_rng_state())
            embeddings.append(sides_of(chunk))
    sides = [paddle.concat(side) for side in zip(*embeddings)]
    for side in sides:
        side.stop_gradient = False
    loss = model.loss(*sides[:2], negative=sides[2] if len(sides) > 2 else None, **about)
    weigh(loss).backward()
    gradients = zip(*(side.grad.detach().split([len(chunk[0]) for chunk in chunks]) for side in sides))
    for number, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients), start=1):
        paddle.set_rng_state(state)
        with exchange(last and number == len(chunks)):
            parts = sides_of(chunk)
            sum((part * each).sum() for part, each in zip(parts, gradient)).backward()
    return loss


def train_faster_on_cpu(model) -> None:
    """The same gradients in less time.

    glibc is told to keep what is freed; else it maps and zeroes anew every large tensor of a step. And the gradients of
    biases become matrix products, since paddle sums rows on a CPU several times slower than MKL multiplies.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)

    class FastBias(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return linear(x, weight, bias)

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensor()
            x_rows, rows = (tensor.reshape([-1, tensor.shape[-1]]) for tensor in (x, gradient))
            return (paddle.matmul(gradient, weight, transpose_y=True), paddle.matmul(x_rows, rows, transpose_x=True),
                    paddle.matmul(paddle.ones([1, rows.shape[0]]), rows)[0])

    def replace(layer) -> None:
        layer.forward = lambda x: (FastBias.apply if layer.training else linear)(x, layer.weight, layer.bias)

    for layer in model.sublayers():
        if type(layer) is Linear and layer.bias is not None:
            replace(layer)
