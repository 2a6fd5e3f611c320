"""The device of this process, and the other processes that a launcher started beside it."""

import ctypes
import signal

from simcse.console import InputError
from simcse.machine import default_threads

import numpy as np
import paddle

LAUNCHER_GONE = signal.SIGUSR1  # not SIGTERM: it comes once for each thread of the launcher


def set_device(device: str, cpu_threads: int = 0) -> None:
    """Make `device` ("cpu", "gpu") the current one, with `cpu_threads` math threads (0: all cores) on a CPU.

    Raises:
        InputError: this paddle, or this machine, has no such device.
    """
    if device == "gpu" and not (paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count()):
        raise InputError("--device gpu: no GPU that this paddlepaddle can use; run with --device cpu, "
                         "or install paddlepaddle-gpu (requirements-gpu.txt)")
    paddle.set_device(device)
    # paddle starts with one math thread.
    paddle.base.core.set_num_threads(cpu_threads or default_threads())


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return paddle.distributed.get_rank() == 0


def join_ranks() -> tuple[int, int]:
    """Make this process one of those that the launcher started, if it did; its rank, and how many there are."""
    if (ranks := paddle.distributed.get_world_size()) > 1:
        if hasattr(libc := ctypes.CDLL(None), "prctl"):  # Linux: a launcher that is killed does not end its processes
            pr_set_pdeathsig = 1
            libc.prctl(pr_set_pdeathsig, LAUNCHER_GONE)
        paddle.distributed.init_parallel_env()
    return paddle.distributed.get_rank(), ranks


def wait_for_ranks() -> None:
    """Wait until all ranks are here."""
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.barrier()


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all ranks, which have one shape and dtype."""
    if paddle.distributed.get_world_size() == 1:
        return [array]
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, paddle.to_tensor(array))
    return [part.numpy() for part in parts]


def gather_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """The rows of all ranks, rank 0's first; gradients flow to those of this rank."""
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, tensor.detach())
    parts[paddle.distributed.get_rank()] = tensor
    return paddle.concat(parts)
