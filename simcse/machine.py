"""What this machine has and this process is, without importing paddle."""

import contextlib
import ctypes
import functools
import math
import os

PROCESSOR = ""  # what Linux says of the first one
with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
    PROCESSOR = cpuinfo.read(4096)
CPU_HAS_AMX = " amx_bf16" in PROCESSOR
CPU_HAS_BF16 = " avx512_bf16" in PROCESSOR or CPU_HAS_AMX
# Intel's AVX-512 BF16 without AMX: oneDNN in bf16 takes 1.6 times as long as in fp32 there; on AMD's half as long.
CPU_BF16_IS_FASTER = CPU_HAS_BF16 and (CPU_HAS_AMX or "AuthenticAMD" in PROCESSOR)
BATCH_TOKENS = {True: 2048, False: 65536}  # of a batch, padding included, that keep a processor busy: is it a CPU?
CPU_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Which of the processes that paddle's launcher started this is, and how many there are.
RANK, RANKS = int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
PARENT = os.getppid()  # as this process started: where there are several ranks, the launcher
CPU_THREADS = max(1, CPU_CORES // RANKS)  # of math, where none are asked for: ranks on one machine share its cores

TRAIN_PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")  # number formats of matrix products in training


def auto_precision(device: str) -> str:
    """What `--precision auto` is: bf16 on a CPU that is faster in it; on GPUs bf16 from compute capability 8.0 on, and
    fp16 from 7.0 on; else fp32."""
    if device == "gpu":
        generation = gpu_generation()
        return "bf16" if generation >= 8 else "fp16" if generation >= 7 else "fp32"
    return "bf16" if device == "cpu" and CPU_BF16_IS_FASTER else "fp32"


@functools.cache
def gpu_generation() -> int:
    """The major number of the compute capability of the GPUs that this process may use, the lowest of them, as CUDA's
    driver has it; 0 where there is none."""
    compute_capability_major = 75  # of the driver's CUdevice_attribute
    count, major, found = ctypes.c_int(), ctypes.c_int(), []
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)):
            for device in range(count.value):
                driver.cuDeviceGetAttribute(ctypes.byref(major), compute_capability_major, device)
                found.append(major.value)
    return min(found, default=0)


def available_memory() -> float:
    """Bytes that can be had; infinite where the system does not say."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return math.inf
