"""What this machine has and this process is, without importing paddle."""

import math
import os


def _processor() -> str:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read(4096)
    except OSError:
        return ""


PROCESSOR = _processor()
CPU_HAS_BF16 = " avx512_bf16" in PROCESSOR or " amx_bf16" in PROCESSOR
# Intel's AVX-512 BF16 without AMX: oneDNN in bf16 takes 1.6 times as long as in fp32 there; on AMD's half as long.
CPU_BF16_IS_FASTER = CPU_HAS_BF16 and (" amx_bf16" in PROCESSOR or "AuthenticAMD" in PROCESSOR)
CPU_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Which of the processes that paddle's launcher started this is, and how many there are.
RANK, RANKS = int(os.environ.get("PADDLE_TRAINER_ID", 0)), int(os.environ.get("PADDLE_TRAINERS_NUM", 1))


def default_threads() -> int:
    """Math threads where none are asked for: all cores, which ranks on one machine share."""
    return max(1, CPU_CORES // RANKS)


def auto_precision(device: str) -> str:
    """What `--precision auto` is: bf16 on a CPU that is faster in it, else fp32."""
    return "bf16" if device == "cpu" and CPU_BF16_IS_FASTER else "fp32"


def available_memory() -> float:
    """Bytes that can be had; infinite where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


# Tokens of a batch, padding included, that keep a processor busy, by whether it is a CPU.
BATCH_TOKENS = {True: 2048, False: 65536}
