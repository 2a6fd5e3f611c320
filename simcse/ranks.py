"""The device of this process, and the other processes that a launcher started beside it."""

import ctypes
import os
import signal
from collections.abc import Callable, Sequence

from simcse.machine import PARENT, RANK, RANKS

import numpy as np
import paddle

LAUNCHER_GONE = signal.SIGUSR1  # not SIGTERM: it comes once for each thread of the launcher


def join_ranks() -> None:
    """Make this process one of those that the launcher started, if it did."""
    if RANKS > 1:
        end_with_launcher()
        paddle.distributed.init_parallel_env()


def end_with_launcher() -> None:
    """Have LAUNCHER_GONE sent to this process when its launcher ends, which may be killed, or has been since it started
    this process. Linux alone has that."""
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, LAUNCHER_GONE)
        if os.getppid() != PARENT:
            os.kill(os.getpid(), LAUNCHER_GONE)


def wait_for_ranks() -> None:
    """Wait until all ranks are here."""
    if RANKS > 1:
        paddle.distributed.barrier()


def largest(number: int) -> int:
    """The largest of the numbers of all ranks, which call it together."""
    return max(int(each[0]) for each in gather_arrays(np.array([number], "int64")))


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all ranks, which have one shape and dtype."""
    return [array] if RANKS == 1 else np.split(gather_rows(paddle.to_tensor(array)).numpy(), RANKS)


def encode_shares(encode: Callable[[Sequence], np.ndarray], texts: Sequence) -> np.ndarray:
    """What `encode` makes of the texts, float32 [texts, size], of which every rank encodes its share; all ranks call it
    together."""
    share = -(-len(texts) // RANKS)
    own = encode(texts[RANK * share : (RANK + 1) * share])
    return np.concatenate(gather_arrays(np.pad(own, ((0, share - len(own)), (0, 0)))))[: len(texts)]


def gather_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """The rows of all ranks, rank 0's first; gradients flow to those of this rank."""
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, tensor.detach())
    parts[RANK] = tensor
    return paddle.concat(parts)
