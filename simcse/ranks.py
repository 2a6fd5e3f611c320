"""The device of this process, and the other processes that a launcher started beside it."""

import ctypes
import os
import signal

from simcse.console import InputError
from simcse.machine import CPU_THREADS, RANK, RANKS

import numpy as np
import paddle

LAUNCHER_GONE = signal.SIGUSR1  # not SIGTERM: it comes once for each thread of the launcher


def set_device(device: str, cpu_threads: int = 0) -> None:
    """Make `device` ("cpu", "gpu") the current one, with `cpu_threads` math threads (0: all cores) on a CPU; InputError
    where this paddle, or this machine, has no such device."""
    if device == "gpu":
        visible_gpus()
    paddle.set_device(device)
    paddle.base.core.set_num_threads(cpu_threads or CPU_THREADS)  # paddle starts with one


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them, else by their numbers;
    InputError where there is none."""
    count = paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
    if not count:
        raise InputError("--device gpu: no GPU that this paddlepaddle can use; run with --device cpu (DEVICE=cpu of "
                         "the shell scripts), or install a GPU build (README, chapter 2)")
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in names.split(",")][:count]  # CUDA takes those before the first that is not there


def join_ranks() -> None:
    """Make this process one of those that the launcher started, if it did."""
    if RANKS > 1:
        if hasattr(libc := ctypes.CDLL(None), "prctl"):  # Linux: a launcher that is killed does not end its processes
            pr_set_pdeathsig = 1
            libc.prctl(pr_set_pdeathsig, LAUNCHER_GONE)
        paddle.distributed.init_parallel_env()


def wait_for_ranks() -> None:
    """Wait until all ranks are here."""
    if RANKS > 1:
        paddle.distributed.barrier()


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """The arrays of all ranks, which have one shape and dtype."""
    return [array] if RANKS == 1 else np.split(gather_rows(paddle.to_tensor(array)).numpy(), RANKS)


def gather_rows(tensor: paddle.Tensor) -> paddle.Tensor:
    """The rows of all ranks, rank 0's first; gradients flow to those of this rank."""
    parts: list[paddle.Tensor] = []
    paddle.distributed.all_gather(parts, tensor.detach())
    parts[RANK] = tensor
    return paddle.concat(parts)
