"""Number formats of a network's matrix products on a GPU."""

import contextlib
from typing import Any

from simcse.console import InputError
from simcse.machine import auto_precision, gpu_generation

import paddle

NEEDED = {"fp16": 7, "bf16": 8, "tf32": 8}  # compute capability, its major number


def gpu_precision(precision: str) -> str:
    """What `--precision` is on the GPUs at hand, and from now on in this process; InputError where they do not have it.

    Products of float32 are rounded to TF32 (a significand of 11 bits) in "tf32" alone: by itself paddle 3 rounds none,
    and paddle 2.6 rounds them on every GPU that can."""
    if precision == "auto":
        precision = auto_precision("gpu")
    if gpu_generation() < NEEDED.get(precision, 0):
        raise InputError(f"--precision {precision}: this GPU does not have it")
    core = paddle.base.core
    for switch in (core.set_cublas_switch, core.set_cudnn_switch):
        switch(precision == "tf32")
    return precision


def casting(precision: str) -> contextlib.AbstractContextManager[Any]:
    """What has the matrix products within it computed in `precision`, where their operands have to be cast for it."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision)
    return paddle.amp.auto_cast(level="O1", dtype=dtype) if dtype else contextlib.nullcontext()
