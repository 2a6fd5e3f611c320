"""Say, before a long piece of work, how much memory it needs and how much is available."""

import math

from simcse import console
from simcse.machine import LOCAL_RANKS, RANK, available_memory, resident_memory

LARGE_FRACTION = 0.5  # of what is granted; above it the announcement is a warning


def announce_memory(additional_bytes: float) -> None:
    """Log how much memory the processes on this machine are going to need, and how much is available to them.

    It is a warning if it is a large part. A process that exceeds its cgroup's limit is killed without a message.

    Args:
        additional_bytes: what the work takes beyond what this process has now, an estimate.
    """
    free = available_memory()
    if RANK or math.isinf(free):
        return
    present = LOCAL_RANKS * resident_memory()
    needed = present + LOCAL_RANKS * additional_bytes
    granted = present + free
    subject = f"{LOCAL_RANKS} processes need" if LOCAL_RANKS > 1 else "this process needs"
    message = f"{subject} about {needed / 1e9:.2f} GB of memory; {granted / 1e9:.2f} GB are available"
    if needed > granted:
        console.warn(f"{message}: the system may kill it without a message; allow more, or use several machines")
    elif needed > LARGE_FRACTION * granted:
        console.warn(message)
    else:
        console.log(message)
