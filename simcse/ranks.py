"""The other processes that paddle's launcher started with this one: joining them, waiting, exchanging arrays.

A rank is one of these processes. A function that exchanges something waits until all ranks have called it.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Sequence

from simcse.machine import PARENT, RANK, RANKS
from simcse.signals import hold_signals

import numpy as np

with hold_signals():
    import paddle

LAUNCHER_GONE = signal.SIGUSR1  # not SIGTERM: it comes once for each thread of the launcher


def join_ranks() -> None:
    """Make this process one of those that the launcher started, if it did."""
    if RANKS > 1:
        end_with_launcher()
        paddle.distributed.init_parallel_env()


def end_with_launcher() -> None:
    """Have the system send LAUNCHER_GONE to this process when its launcher ends, which only Linux can.

    A launcher that is killed leaves its processes running otherwise.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "prctl"):
        return
    pr_set_pdeathsig = 1
    libc.prctl(pr_set_pdeathsig, LAUNCHER_GONE)
    if os.getppid() != PARENT:  # it ended between the start of this process and now
        os.kill(os.getpid(), LAUNCHER_GONE)


def wait_for_ranks() -> None:
    """Wait until all ranks have called this."""
    if RANKS > 1:
        paddle.distributed.barrier()


def gather_numbers(number: int) -> list[int]:
    """Return the numbers of all ranks, rank 0's first; all ranks call it together."""
    return [int(array[0]) for array in gather_arrays(np.array([number], "int64"))]


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank; all ranks call it together."""
    return any(gather_numbers(int(flag)))


def all_equal(number: int) -> bool:
    """Return whether all ranks have the same number; all ranks call it together."""
    return len(set(gather_numbers(number))) == 1


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """Return the arrays of all ranks, rank 0's first; all ranks call it together, with one shape and dtype."""
    if RANKS == 1:
        return [array]
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, paddle.to_tensor(array))
    return [part.numpy() for part in parts]


def gather_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """Return the rows of all ranks' tensors, rank 0's first; gradients flow to the rows of this rank.

    All ranks call it together.
    """
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, tensor.detach())
    parts[RANK] = tensor
    return paddle.concat(parts)


def encode_shares(encode: Callable[[Sequence], np.ndarray], texts: Sequence) -> np.ndarray:
    """Encode texts, of which every rank takes a share; all ranks call it together.

    Args:
        encode: returns float32 [texts, size].
        texts: all texts, the same in every rank.

    Returns:
        float32 [texts, size], all of them, in every rank.
    """
    share = -(-len(texts) // RANKS)  # rounded up, so that the last ranks may have fewer or none
    embeddings = encode(texts[RANK * share : (RANK + 1) * share])
    missing = share - len(embeddings)
    padded = np.pad(embeddings, ((0, missing), (0, 0)))  # ranks gather arrays of one shape
    return np.concatenate(gather_arrays(padded))[: len(texts)]
