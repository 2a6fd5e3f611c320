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
    """The row of a difference, which NaN is never small enough for."""
    figure = float(f"{difference:.3g}")
    report(what, figure if math.isfinite(figure) else str(figure), "", f"<= {most:g}", bool(difference <= most))


@contextlib.contextmanager
def unless_refused(what: str) -> Iterator[None]:
    """Where the device or the build lacks a precision, or TensorRT, a row says so."""
    try:
        yield
    except (console.InputError, predictor.InputError) as error:
        if not re.match("(argument )?--(precision|use_tensorrt)", str(error)):
            raise
        report(what, f"not there: {error}")


@contextlib.contextmanager
def command_line(name: str, *words: Any) -> Iterator[Any]:
    """A script of the project, as a module, which within finds these words on its command line; its refusal of them is
    an InputError."""
    def refuse(parser: flags.ArgumentParser, message: str) -> None:
        raise console.InputError(message)

    with (patch.object(sys, "argv", [f"{name}.py", *map(str, words)]),
          patch.object(flags.ArgumentParser, "error", refuse)):
        yield importlib.import_module(name)


@contextlib.contextmanager
def ending(name: str) -> Iterator[None]:
    """A script may end within; InputError where it does not end well."""
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise console.InputError(f"{name}.py ended with exit code {end.code}") from None


def call(name: str, *words: Any) -> str:
    """What a script, run in this process, prints to stdout."""
    printed = io.StringIO()
    with command_line(name, *words) as script, contextlib.redirect_stdout(printed), ending(name):
        script.main()
    return printed.getvalue()


def alone(script: str, *words: Any) -> str:
    """What a script prints to stdout as a process of its own; InputError, its last line, where it fails."""
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise console.InputError(last_line(done.stderr).removeprefix(f"{os.path.basename(script)}: error: "))
    return done.stdout


def on_all_cards(device: str, folder: str, *words: Any) -> tuple[int, list[str]]:
    """Run a script on all GPUs, or as two processes on a CPU: the exit code, and what each of them said."""
    launcher = ([f"{ROOT}/scripts/launch.py"] if device == "gpu" else
                [f"{HERE}/gpu_jobs.py", "--nproc_per_node", "2", "--backend", "gloo"])
    done = subprocess.run([sys.executable, *launcher, "--log_dir", folder, *map(str, words)], capture_output=True,
                          text=True)
    logs = sorted(name for name in os.listdir(folder) if name.startswith("workerlog.")) if os.path.isdir(folder) else []
    said = []
    for name in logs:
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            said.append(file.read())
    return done.returncode, said or [done.stdout + done.stderr]


def last_line(text: str) -> str:
    """What a process said last, which is its error; of a traceback the exception."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", "ROW "))]
    return lines[-1] if lines else "it said nothing"


def per_second(work: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> float:
    """How often in a second `work` is done, by as often as fills a second; two times before that are not counted."""
    work()
    wait()
    count = min(50, max(1, int(1 / side.seconds_of(lambda: (work(), wait())))))
    return count / side.seconds_of(lambda: ([work() for _ in range(count)], wait()))


if __name__ == "__main__":  # paddle's launcher as a script, which the tests' server can fork
    runpy.run_module("paddle.distributed.launch", run_name="__main__")
