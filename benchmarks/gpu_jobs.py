"""What the jobs of gpu.py share. Each is a process of its own, since one that has made a GPU fail cannot go on."""

import contextlib
import importlib
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from bench import BASE, HERE, ROOT  # first: it makes the project importable
from deploy.python import predictor
from simcse import console, flags

import side

SIZES = {"small": {**BASE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "intermediate_size": 256},
         "mini": {**BASE, "vocab_size": 40_000, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
         "base": {**BASE, "vocab_size": 40_000},
         **{f"{layers} layers": {**BASE, "hidden_size": 96, "num_hidden_layers": layers, "intermediate_size": 384}
            for layers in (6, 12)}}  # as many operators as mini and base, with next to nothing to compute


def serve(jobs: dict[str, Callable[..., None]]) -> None:
    """Run the job that the command line names, with arguments by JSON."""
    jobs[sys.argv[1]](**json.loads(sys.argv[2]))


def report(what: str, figure: Any, unit: str = "", expected: str = "", ok: bool | None = None) -> None:
    """Print a row for gpu.py; `ok` is None where nothing is expected."""
    found = {"what": what, "figure": figure, "unit": unit, "expected": expected, "ok": ok}
    print("ROW " + json.dumps(found), flush=True)


def report_within(what: str, difference: float, most: float) -> None:
    """Print the row of a difference, which is right up to `most`; NaN is wrong."""
    figure = float(f"{difference:.3g}")
    report(what, figure if math.isfinite(figure) else str(figure), "", f"<= {most:g}", bool(difference <= most))


@contextlib.contextmanager
def unless_refused(what: str) -> Iterator[None]:
    """Print a row instead of failing if the device or paddle's build lacks a precision, or TensorRT."""
    try:
        yield
    except (console.InputError, predictor.InputError) as error:
        if not re.match("(argument )?--(precision|use_tensorrt)", str(error)):
            raise
        report(what, f"not there: {error}")


@contextlib.contextmanager
def command_line(name: str, *words: Any) -> Iterator[Any]:
    """Yield a script of the project as a module, with these words on its command line as long as the context lasts.

    Its usage errors become InputError.
    """
    def refuse(parser: flags.ArgumentParser, message: str) -> None:
        raise console.InputError(message)

    with (patch.object(sys, "argv", [f"{name}.py", *map(str, words)]),
          patch.object(flags.ArgumentParser, "error", refuse)):
        yield importlib.import_module(name)


@contextlib.contextmanager
def ending(name: str) -> Iterator[None]:
    """Let a script end within the context; raise InputError if its exit code is not 0."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise console.InputError(f"{name}.py ended with exit code {end.code}") from None


def call(name: str, *words: Any) -> str:
    """Run a script in this process, and return what it prints to stdout."""
    printed = io.StringIO()
    with command_line(name, *words) as script, contextlib.redirect_stdout(printed), ending(name):
        script.main()
    return printed.getvalue()


def alone(script: str, *words: Any) -> str:
    """Run a script as a process of its own, and return what it prints to stdout.

    Raises:
        InputError: its last line, if it fails.
    """
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise console.InputError(last_line(done.stderr).removeprefix(f"{os.path.basename(script)}: error: "))
    return done.stdout


def on_all_cards(device: str, folder: str, *words: Any) -> tuple[int, list[str]]:
    """Run a script on all GPUs, or as two processes on a CPU.

    Returns:
        The exit code, and the log of each process.
    """
    if device == "gpu":
        launcher = [f"{ROOT}/scripts/launch.py"]
    else:
        launcher = [f"{HERE}/gpu_jobs.py", "--nproc_per_node", "2", "--backend", "gloo"]
    done = subprocess.run([sys.executable, *launcher, "--log_dir", folder, *map(str, words)], capture_output=True,
                          text=True)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    logs = []
    for name in sorted(names):
        if name.startswith("workerlog."):
            with open(f"{folder}/{name}", encoding="utf-8") as file:
                logs.append(file.read())
    return done.returncode, logs or [done.stdout + done.stderr]


def last_line(text: str) -> str:
    """Return the last line of stderr, which is the error; of a traceback the exception."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", "ROW "))]
    return lines[-1] if lines else "it printed nothing"


def per_second(work: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> float:
    """Return how many times a second `work` can be called, measured for about a second.

    Args:
        work: called once to warm up, and once to see how often it is called.
        wait: waits until the device has done the work.
    """
    def repeat(count: int) -> None:
        for _ in range(count):
            work()
        wait()

    repeat(1)
    calls_in_a_second = int(1 / side.seconds_of(lambda: repeat(1)))
    count = min(50, max(1, calls_in_a_second))
    return count / side.seconds_of(lambda: repeat(count))


if __name__ == "__main__":  # paddle's launcher as a script, which the tests' server can fork
    runpy.run_module("paddle.distributed.launch", run_name="__main__")
