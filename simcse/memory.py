"""Say, before a long piece of work, how much memory it needs and how much is available; ask for large pages."""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterator

from simcse import console
from simcse.machine import LOCAL_RANKS, RANK, available_memory, resident_memory

LARGE_FRACTION = 0.5  # of what is granted; above it the announcement is a warning
HUGE_PAGE_BYTES = 2 * 2**20
HUGE_PAGE_POLICY = "/sys/kernel/mm/transparent_hugepage/enabled"
MEMORY_MAP = "/proc/self/maps"


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


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Ask Linux for pages of 2 MB in the blocks of memory that appear or grow during a `with` statement.

    It is for memory with random access, where pages of 4 KB are looked up in page tables all the time. Memory that is
    written for the first time after the statement gets them at once; what is written in it gets them later, in the
    background. Nothing happens where the system has no such pages, gives them without being asked, or refuses.
    """
    if not _gives_huge_pages_on_request():
        yield
        return
    blocks_before = _find_blocks()
    yield
    with contextlib.suppress(OSError, AttributeError):  # no madvise in the C library
        madvise = ctypes.CDLL(None).madvise
        for start, size in _find_blocks() - blocks_before:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def _gives_huge_pages_on_request() -> bool:
    """Return whether Linux is set up so that a program gets pages of 2 MB where it asks for them."""
    with contextlib.suppress(OSError), open(HUGE_PAGE_POLICY, encoding="ascii") as file:
        return "[madvise]" in file.read()
    return False


def _find_blocks() -> set[tuple[int, int]]:
    """Return address and size of each block of this process's memory that is writable, of no file, and large enough."""
    blocks = set()
    with contextlib.suppress(OSError), open(MEMORY_MAP, encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.split()  # addresses, rights, offset, device, inode, and the name of a file or of [heap]
            if len(fields) > 5 or not fields[1].startswith("rw-p"):
                continue
            start, end = (int(address, 16) for address in fields[0].split("-"))
            if end - start >= 2 * HUGE_PAGE_BYTES:  # it has a whole page wherever it begins
                blocks.add((start, end - start))
    return blocks
