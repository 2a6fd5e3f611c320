"""The device that paddle computes on, and the number format of its matrix products there."""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from simcse.console import InputError, summary
from simcse.machine import CPU_THREADS, auto_precision, gpu_generation

import paddle

# By versions of paddle and CUDA, the compute capabilities of PyPI's paddlepaddle-gpu, as its machine code shows; it has
# hardly any PTX, which other GPUs could translate.
BUILT_FOR = {("2.6.2", "11.8"): [61, 70, 75, 80, 86]}
NEEDED = {"fp16": 7, "bf16": 8, "tf32": 8}  # the major number of the compute capability


def set_device(device: str, cpu_threads: int = 0) -> None:
    """Choose the device on which paddle computes in this process.

    Args:
        device: "cpu" or "gpu".
        cpu_threads: math threads on a CPU; 0: all cores.

    Raises:
        InputError: this paddle or this machine has no such device, or cannot compute on it.
    """
    if device == "gpu":
        visible_gpus()
        link_cuda_libraries()
    paddle.set_device(device)
    if device == "gpu":
        check_gpu()
    paddle.base.core.set_num_threads(cpu_threads or CPU_THREADS)  # paddle starts with one


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use: their names in CUDA_VISIBLE_DEVICES or, without it, their numbers.

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
    return [name.strip() for name in names.split(",")][:count]  # CUDA takes those before the first that does not exist


def link_cuda_libraries() -> None:
    """Let paddle 2.6 find the CUDA libraries that requirements-gpu.txt installs, by links in its own folder.

    It opens them by names without a version (libcudnn.so), which pip's packages do not have. Where the links cannot be
    made, the libraries have to be in LD_LIBRARY_PATH, which has precedence in any case.
    """
    packages = importlib.util.find_spec("nvidia")
    if not paddle.__version__.startswith("2.") or packages is None:
        return
    folder = Path(paddle.__file__).parent / "libs"
    for root in packages.submodule_search_locations or ():
        for library in Path(root).glob("*/lib/*.so.*"):
            for name in (library.name, library.name.split(".so.")[0] + ".so"):
                with contextlib.suppress(OSError):  # it exists, or the folder cannot be written
                    (folder / name).symlink_to(os.path.relpath(library, folder))


def check_gpu() -> None:
    """Raise InputError if paddle has no code for the current GPU, or if computing on it fails."""
    device = paddle.device.get_device()
    name = paddle.device.cuda.get_device_name(device)
    major, minor = paddle.device.cuda.get_device_capability(device)
    built = compute_capabilities()
    if built and not any(number // 10 == major and number % 10 <= minor for number in built):
        known = ", ".join(f"{number // 10}.{number % 10}" for number in built)
        raise InputError(f"--device gpu: {name} has compute capability {major}.{minor}, and this paddlepaddle-gpu "
                         f"{paddle.__version__} is built for {known}; docs/en/training.md says which one fits")
    try:
        square = paddle.ones([2, 2])
        paddle.nn.functional.softmax(square @ square).numpy()
    except (OSError, MemoryError, RuntimeError, SystemError) as error:
        libraries = "; requirements-gpu.txt has the CUDA libraries" if "dynamic library" in str(error) else ""
        raise InputError(f"--device gpu: {name} cannot be computed on: {summary(error)}{libraries}") from None


def compute_capabilities() -> list[int]:
    """Return the compute capabilities for which paddle has code (86 is 8.6); empty where that is not known.

    Code for one also runs on GPUs of a higher minor number.
    """
    if hasattr(paddle.version, "cuda_archs"):  # paddle 3
        return [int(number) for number in paddle.version.cuda_archs() or ()]
    return BUILT_FOR.get((paddle.__version__, paddle.version.cuda()), [])


def gpu_precision(precision: str) -> str:
    """What `--precision` is on the GPUs at hand, and from now on in this process; InputError where they do not have it.

    Products of float32 are rounded to TF32 (a significand of 11 bits) in "tf32" alone: by itself paddle 3 rounds none,
    and paddle 2.6 rounds them on every GPU that can."""
    if precision == "auto":
        precision = auto_precision("gpu")
    if precision != "fp32" and precision not in NEEDED:
        raise InputError(f"--precision {precision}: a GPU computes in fp32, {', '.join(NEEDED)}")
    if gpu_generation() < NEEDED.get(precision, 0):
        raise InputError(f"--precision {precision}: this GPU does not have it")
    core = paddle.base.core
    for switch in (core.set_cublas_switch, core.set_cudnn_switch):
        switch(precision == "tf32")
    return precision


def casting(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context that casts the operands of matrix products to `precision`, if it is bf16 or fp16."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
    return paddle.amp.auto_cast(level="O1", dtype=dtype) if dtype else contextlib.nullcontext()
