"""One side of a measurement as a process of its own, in whichever Python; see `bench.Bench._start_side`."""

import json
import sys
import time
from collections.abc import Callable


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def serve(functions: dict[str, Callable]) -> None:
    """Run the function that the command line names, and print its values as JSON.

    The first line of stdin has the arguments. A function that measures pass by pass is a generator: its next values are
    printed for every further line.
    """
    function = functions[sys.argv[1]]
    returned = function(**json.loads(sys.stdin.readline()))
    passes = [returned] if isinstance(returned, dict) else returned
    for values in passes:
        print("RESULT " + json.dumps(values), flush=True)
        if not sys.stdin.readline():
            break
