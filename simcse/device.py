"""Set the device that paddle computes on, and the number format of its matrix products there."""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from simcse.console import InputError, summarize_error
from simcse.machine import CPU_THREADS, auto_precision, gpu_generation
from simcse.signals import hold_signals

with hold_signals():
    import paddle

# Compute capabilities (86 is 8.6) that PyPI's paddlepaddle-gpu has machine code for, by versions of paddle and CUDA, as
# read off its libraries. It has next to no PTX, from which a driver could make code for others.
BUILT_FOR = {("2.6.2", "11.8"): [61, 70, 75, 80, 86]}
NEEDED_GENERATION = {"fp16": 7, "bf16": 8, "tf32": 8}  # compute capability, its major number


def set_device(device: str, cpu_threads: int = 0) -> None:
    """Have paddle compute on a device.

    Args:
        device: "cpu" or "gpu".
        cpu_threads: math threads on a CPU; 0: all cores.

    Raises:
        InputError: this paddle, or this machine, has no such device, or cannot compute on it.
    """
    if device == "gpu":
        visible_gpus()
        link_cuda_libraries()
    paddle.set_device(device)
    if device == "gpu":
        check_gpu()
    paddle.base.core.set_num_threads(cpu_threads or CPU_THREADS)  # paddle starts with one


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use: their names in CUDA_VISIBLE_DEVICES, else their numbers.

    Raises:
        InputError: there is none.
    """
    count = paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
    if not count:
        raise InputError("--device gpu: no GPU that this paddlepaddle can use; run with --device cpu (DEVICE=cpu of "
                         "the shell scripts), or install a GPU build (README, chapter 2)")
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in names.split(",")][:count]  # CUDA ignores those after the first missing one


def link_cuda_libraries() -> None:
    """Let paddle 2.6 find the CUDA libraries that requirements-gpu.txt installs.

    It opens them by names without a version (libcudnn.so), which pip's packages do not have, and looks into its own
    folder, so links are made there. Where they cannot be made, LD_LIBRARY_PATH has to name the libraries; paddle looks
    there first.
    """
    packages = importlib.util.find_spec("nvidia")
    if not paddle.__version__.startswith("2.") or packages is None:
        return
    folder = Path(paddle.__file__).parent / "libs"
    for root in packages.submodule_search_locations or ():
        for library in Path(root).glob("*/lib/*.so.*"):
            for name in (library.name, library.name.split(".so.")[0] + ".so"):
                with contextlib.suppress(OSError):  # the link exists, or the folder cannot be written
                    (folder / name).symlink_to(os.path.relpath(library, folder))


def check_gpu() -> None:
    """Raise InputError if paddle has no code for the current GPU, or if computing on it fails."""
    device = paddle.device.get_device()
    name = paddle.device.cuda.get_device_name(device)
    major, minor = paddle.device.cuda.get_device_capability(device)
    built_for = compute_capabilities()
    # Code runs on GPUs of the same major number and the same or a higher minor number.
    if built_for and not any(built // 10 == major and built % 10 <= minor for built in built_for):
        known = ", ".join(f"{built // 10}.{built % 10}" for built in built_for)
        raise InputError(f"--device gpu: {name} has compute capability {major}.{minor}, and this paddlepaddle-gpu "
                         f"{paddle.__version__} is built for {known}; docs/en/training.md says which one fits")
    try:
        square = paddle.ones([2, 2])
        paddle.nn.functional.softmax(square @ square).numpy()
    except (OSError, MemoryError, RuntimeError, SystemError) as error:
        hint = "; requirements-gpu.txt has the CUDA libraries" if "dynamic library" in str(error) else ""
        raise InputError(f"--device gpu: {name} cannot be computed on: {summarize_error(error)}{hint}") from None


def compute_capabilities() -> list[int]:
    """Return the compute capabilities that paddle has code for, as 86 for 8.6; [] if that is not known."""
    if hasattr(paddle.version, "cuda_archs"):  # paddle 3
        return [int(capability) for capability in paddle.version.cuda_archs() or ()]
    return BUILT_FOR.get((paddle.__version__, paddle.version.cuda()), [])


def set_gpu_precision(precision: str) -> str:
    """Set whether a GPU rounds float32 products to TF32 in this process, and return the number format that is used.

    Products of float32 are rounded to TF32 (a significand of 11 bits) only with "tf32". By itself paddle 3 rounds none,
    and paddle 2.6 rounds them on every GPU that can.

    Args:
        precision: "auto", "fp32" or one of NEEDED_GENERATION.

    Returns:
        "fp32" or one of NEEDED_GENERATION: what "auto" means here, or `precision` itself.

    Raises:
        InputError: the GPUs do not have this precision.
    """
    if precision == "auto":
        precision = auto_precision("gpu")
    if precision != "fp32" and precision not in NEEDED_GENERATION:
        raise InputError(f"--precision {precision}: a GPU computes in fp32, {', '.join(NEEDED_GENERATION)}")
    if gpu_generation() < NEEDED_GENERATION.get(precision, 0):
        raise InputError(f"--precision {precision}: this GPU does not have it")
    paddle.base.core.set_cublas_switch(precision == "tf32")
    paddle.base.core.set_cudnn_switch(precision == "tf32")
    return precision


def cast_products(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which paddle casts the operands of matrix products to bf16 or fp16.

    For other precisions the context does nothing.
    """
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
    if dtype is None:
        return contextlib.nullcontext()
    return paddle.amp.auto_cast(level="O1", dtype=dtype)
