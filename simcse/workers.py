"""Compute with several processes on one machine, and get the results in order."""

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from simcse.console import InputError
from simcse.signals import SIGNALS, hold_signals

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items for each worker that are computed, or wait, before the caller has taken the oldest result

_function: Callable | None = None  # of a worker: what it computes


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield what a function returns for each item, in the order of the items.

    No more than AHEAD results for each worker are kept, however many items there are.

    Args:
        function: computes an item. The workers are forks of this process, so that it may refer to anything; what it
            changes is changed in the worker alone. Items and results are pickled.
        items: each a piece of work of a tenth of a second or more, since sending it takes time as well.
        workers: processes; with 1 this process computes.

    Raises:
        InputError: a worker has been killed, as the system does when memory runs out.
    """
    if workers == 1:
        yield from map(function, items)
        return
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker,
                                   (function, os.getpid()))
    pending = deque()
    try:
        for item in items:
            with hold_signals():  # it forks: Python loses what a handler raises meanwhile, and workers wait for ever
                future = executor.submit(_compute, item)
            pending.append(future)
            if len(pending) == AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(f"--workers {workers}: one of them has been killed; if memory ran out, a lower number takes "
                         "less") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(function: Callable, parent: int) -> None:
    """Set a worker up: it computes `function`, and ends with its parent."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C goes to the parent too, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the fork was within hold_signals
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # only Linux has it; elsewhere a killed parent leaves its workers
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended between the fork and now
        os._exit(1)


def _compute(item: Item) -> Result:
    """Return what the function of this worker returns for an item."""
    return _function(item)
