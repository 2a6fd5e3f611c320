"""Ask Linux for huge pages, of 2 MB instead of 4 KB, for memory with random access."""

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

HUGE_PAGE_BYTES = 2 * 2**20
HUGE_PAGE_POLICY = "/sys/kernel/mm/transparent_hugepage/enabled"
MEMORY_MAP = "/proc/self/maps"


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
