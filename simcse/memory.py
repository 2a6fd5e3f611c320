"""Say, before a long piece of work, how much memory it needs and how much is granted."""

import math

from simcse import console
from simcse.machine import RANK, RANKS, available_memory, resident_memory

LARGE_FRACTION = 0.5  # of what is granted; above it the announcement is a warning


def announce_memory(more: float) -> None:
    """Log how much memory this process is going to need, and how much is granted; warn if it is a large part of it.

    A process that takes more than its control group grants is killed without a line.

    Args:
        more: bytes that the work takes beyond what the process has now, an estimate.
    """
    free = available_memory()
    if RANK or math.isinf(free):
        return
    present = resident_memory()
    needed = present + more
    granted = present + free
    subject = f"each of {RANKS} processes" if RANKS > 1 else "this process"
    message = f"{subject} needs about {needed / 1e9:.2f} GB of memory; {granted / 1e9:.2f} GB are granted"
    if needed > granted:
        console.warn(f"{message}: the system may kill it without a message; grant more, or use several machines")
    elif needed > LARGE_FRACTION * granted:
        console.warn(message)
    else:
        console.log(message)
