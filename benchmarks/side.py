"""One side of a measurement as a process of its own, in whichever Python; see `bench.Bench.side`."""

import json
import sys
import time
from collections.abc import Callable


def seconds_of(work: Callable[[], object]) -> float:
    """What it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve(functions: dict[str, Callable]) -> None:
    """Run the function that the command line names, with arguments by JSON in the first line of stdin, and print its
    figures; of one that measures pass by pass, a generator, the next ones for every further line."""
    found = functions[sys.argv[1]](**json.loads(sys.stdin.readline()))
    for figures in [found] if isinstance(found, dict) else found:
        print("RESULT " + json.dumps(figures), flush=True)
        if not sys.stdin.readline():
            break
