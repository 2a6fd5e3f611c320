"""The device of this process, and the other processes that a launcher started beside it."""

import contextlib
import ctypes
import importlib.util
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from simcse.console import InputError, summary
from simcse.machine import CPU_THREADS, PARENT, RANK, RANKS

import numpy as np
import paddle

# Of PyPI's paddlepaddle-gpu, as the machine code in it says, by versions of paddle and CUDA; it has no PTX to speak of.
BUILT_FOR = {("2.6.2", "11.8"): [61, 70, 75, 80, 86]}
LAUNCHER_GONE = signal.SIGUSR1  # not SIGTERM: it comes once for each thread of the launcher


def set_device(device: str, cpu_threads: int = 0) -> None:
    """Make `device` ("cpu", "gpu") the current one, with `cpu_threads` math threads (0: all cores) on a CPU; InputError
    where this paddle, or this machine, has no such device, or cannot compute on it."""
    if device == "gpu":
        visible_gpus()
        link_cuda_libraries()
    paddle.set_device(device)
    if device == "gpu":
        check_gpu()
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


def link_cuda_libraries() -> None:
    """Have paddle 2.6 find the CUDA libraries that requirements-gpu.txt installs: it opens them by names without a
    version (libcudnn.so), which pip's packages do not have, and looks into its own folder, so links are made there.
    Where they cannot be made, the libraries have to be in LD_LIBRARY_PATH, which is looked into before."""
    packages = importlib.util.find_spec("nvidia")
    if not paddle.__version__.startswith("2.") or packages is None:
        return
    folder = Path(paddle.__file__).parent / "libs"
    for root in packages.submodule_search_locations or ():
        for library in Path(root).glob("*/lib/*.so.*"):
            for name in (library.name, library.name.split(".so.")[0] + ".so"):
                with contextlib.suppress(OSError):  # it is there, or the folder cannot be written
                    (folder / name).symlink_to(os.path.relpath(library, folder))


def check_gpu() -> None:
    """InputError where paddle has no code for the current GPU, or where computing on it fails."""
    device = paddle.device.get_device()
    name = paddle.device.cuda.get_device_name(device)
    major, minor = paddle.device.cuda.get_device_capability(device)
    built = compute_capabilities()
    if built and not any(each // 10 == major and each % 10 <= minor for each in built):
        known = ", ".join(f"{each // 10}.{each % 10}" for each in built)
        raise InputError(f"--device gpu: {name} has compute capability {major}.{minor}, and this paddlepaddle-gpu "
                         f"{paddle.__version__} is built for {known}; docs/en/training.md says which one fits")
    try:
        square = paddle.ones([2, 2])
        paddle.nn.functional.softmax(square @ square).numpy()
    except (OSError, MemoryError, RuntimeError, SystemError) as error:
        libraries = "; requirements-gpu.txt has the CUDA libraries" if "dynamic library" in str(error) else ""
        raise InputError(f"--device gpu: {name} cannot be computed on: {summary(error)}{libraries}") from None


def compute_capabilities() -> list[int]:
    """What GPUs paddle holds code for, by compute capability (86 is 8.6), each for those of higher minor numbers too;
    empty where that is not known."""
    if hasattr(paddle.version, "cuda_archs"):  # paddle 3
        return [int(each) for each in paddle.version.cuda_archs() or ()]
    return BUILT_FOR.get((paddle.__version__, paddle.version.cuda()), [])


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
