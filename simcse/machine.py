"""What this machine has and which process this is, without importing paddle."""

import contextlib
import ctypes
import functools
import math
import os

PROCESSOR = ""  # Linux' description of the first one
with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
    PROCESSOR = cpuinfo.read(4096)
CPU_HAS_AMX = " amx_bf16" in PROCESSOR
CPU_HAS_BF16 = " avx512_bf16" in PROCESSOR or CPU_HAS_AMX
# Intel's AVX-512 BF16 without AMX: oneDNN in bf16 takes 1.6 times as long as in fp32 there; on AMD's half as long.
CPU_BF16_IS_FASTER = CPU_HAS_BF16 and (CPU_HAS_AMX or "AuthenticAMD" in PROCESSOR)
CGROUPS = "/sys/fs/cgroup"
CGROUP_OF_PROCESS = "/proc/self/cgroup"
# By device, the tokens of a batch, padding included, that keep the processor busy.
BATCH_TOKENS = {"cpu": 2048, "gpu": 65536}
# Which of the processes that paddle's launcher started this is, and how many there are.
RANK = int(os.environ.get("PADDLE_TRAINER_ID", 0))
RANKS = int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
LOCAL_RANKS = int(os.environ.get("PADDLE_LOCAL_SIZE", RANKS))  # those on this machine
PARENT = os.getppid()  # at the start of this process; of one of several ranks it is the launcher
TRAIN_PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")  # number formats of matrix products in training
ENCODE_PRECISIONS = (*TRAIN_PRECISIONS, "int8")  # in encoding


def cgroup_values(controller: str, name_v2: str, name_v1: str) -> list[str]:
    """Return what the control groups of this process, each within the next, say in a file: as containers limit it.

    Args:
        controller: of version 1.
        name_v2, name_v1: the file's name in the two versions.
    """
    values = []
    with contextlib.suppress(OSError), open(CGROUP_OF_PROCESS, encoding="utf-8") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "":
                root, name = CGROUPS, name_v2
            elif controller in controllers.split(","):
                root, name = os.path.join(CGROUPS, controllers), name_v1
            else:
                continue
            folder = os.path.normpath(root + path)
            while folder.startswith(root):
                with contextlib.suppress(OSError), open(os.path.join(folder, name), encoding="ascii") as file:
                    values.append(file.read().strip())
                folder = os.path.dirname(folder)
    return values


def count_cores() -> int:
    """Return how many cores this process may use: by its affinity, and by the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Microseconds of all cores together in a period, and the period; version 2 has both in one file.
    quotas = cgroup_values("cpu", "cpu.max", "cpu.cfs_quota_us")
    periods = cgroup_values("cpu", "cpu.max", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods):
        granted = quota.split()[0]
        if granted not in ("max", "-1"):
            cores = min(cores, max(1, int(granted) // int(period.split()[-1])))
    return cores


CPU_CORES = count_cores()
CPU_THREADS = max(1, CPU_CORES // LOCAL_RANKS)  # the default of --cpu_threads: ranks on one machine share its cores


def auto_precision(device: str) -> str:
    """Return the number format that `--precision auto` means on a device, "cpu" or "gpu".

    On a CPU that is bf16 if it is faster in it. On GPUs it is bf16 from compute capability 8.0 on, and fp16 from 7.0
    on. Everywhere else it is fp32.
    """
    if device == "gpu":
        generation = gpu_generation()
        if generation >= 8:
            return "bf16"
        return "fp16" if generation >= 7 else "fp32"
    return "bf16" if device == "cpu" and CPU_BF16_IS_FASTER else "fp32"


@functools.cache
def gpu_generation() -> int:
    """Return the major number of the GPUs' compute capability, the lowest of those that this process may use.

    CUDA's driver is asked, since paddle is not imported yet. 0: there is no GPU.
    """
    compute_capability_major = 75  # of the driver's CUdevice_attribute
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    device_count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(device_count)):  # other codes than 0 are errors
        return 0
    generations = []
    major = ctypes.c_int()
    for device in range(device_count.value):
        driver.cuDeviceGetAttribute(ctypes.byref(major), compute_capability_major, device)
        generations.append(major.value)
    return min(generations, default=0)


def resident_memory() -> int:
    """Return the bytes of memory that this process has now; 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def available_memory() -> float:
    """Return the bytes of memory that can be had, by the machine and by the limits of the control groups.

    It is infinite where the system does not tell.
    """
    available = math.inf
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                available = 1024 * int(line.split()[1])
    limits = cgroup_values("memory", "memory.max", "memory.limit_in_bytes")
    used = cgroup_values("memory", "memory.current", "memory.usage_in_bytes")
    statistics = cgroup_values("memory", "memory.stat", "memory.stat")
    for limit, usage, statistic in zip(limits, used, statistics):
        if limit == "max":
            continue
        counts = dict(line.split() for line in statistic.splitlines())
        reclaimable = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
        available = min(available, int(limit) - int(usage) + reclaimable)
    return available
