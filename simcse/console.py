"""What a person sees of a running script: log lines, progress and errors on stderr, results on stdout, exit codes."""

import contextlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, TextIO

from simcse.machine import RANK, RANKS

PROGRAM = os.path.basename(sys.argv[0])  # the script that runs
HOW_TO_INSTALL = f"is not installed for {sys.executable}; pip install -r requirements.txt, or . .venv/bin/activate"
SECONDS_PER_LINE = 10


class InputError(Exception):
    """A mistake in a flag or an input file: reported in one line, exit code 2, no traceback."""


# --quiet, --strict_data, --plain_text; whether the lines that are answered are progress enough; how many progress bars
# are on the terminal now; the program's flags that less memory is taken with
settings = SimpleNamespace(quiet=False, strict=False, plain_text=False, answering=False, bars=0, memory_flags=())
GPU_TROUBLE = re.compile(r"\b(CUDA|CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CURAND|CUFFT|NCCL) error|third-party dynamic library|"
                         "Unsupported GPU architecture", re.IGNORECASE)


def log(message: str) -> None:
    """Print one line to stderr, unless --quiet."""
    if not settings.quiet:
        warn(message)


def log_from_handler(message: str) -> None:
    """`log` for a signal handler: past stderr's buffer, which it must not enter again, and below a progress bar."""
    if not settings.quiet:
        os.write(2, ("\n" * bool(settings.bars) + message + "\n").encode())


def warn(message: str, file: TextIO | None = None) -> None:
    """Print one line to stderr, or to `file`, above the progress bar where there is one."""
    if settings.bars:
        from tqdm import tqdm

        tqdm.write(message, file=file or sys.stderr)
    else:
        print(message, file=file or sys.stderr, flush=True)


def complain(message: str) -> None:
    """`warn` of something wrong with the data; with --strict_data it is an InputError."""
    if settings.strict:
        raise InputError(f"{message} (--strict_data)")
    warn(message)


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """What has been accepted once is read without --strict_data and with --plain_text."""
    before = settings.strict, settings.plain_text
    settings.strict, settings.plain_text = False, True
    try:
        yield
    finally:
        settings.strict, settings.plain_text = before


def result(message: str) -> None:
    """Print one line to stdout, as `warn` does to stderr."""
    warn(message, sys.stdout)


class _Lines:
    """Progress where there is no terminal: a line every so many seconds."""

    def __init__(self, what: str, meter: dict[str, Any]) -> None:
        self.what, self.meter, self.done = what, meter, meter["initial"]
        self.started = self.last = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.done += count
        if (now := time.monotonic()) - self.last < SECONDS_PER_LINE:
            return
        from tqdm import tqdm

        self.last = now
        left = "" if self.meter["total"] is None else " of {total_fmt} ({percentage:.0f} %)"
        shape = "{desc}: {n_fmt}" + left + ", {rate_noinv_fmt}" + (left and ", {remaining} left")
        log(tqdm.format_meter(self.done, elapsed=now - self.started, prefix=self.what, bar_format=shape, **self.meter))


@contextlib.contextmanager
def progress(what: str, total: int | None, unit: str, lines: bool = True, done: int = 0) -> Iterator[Callable]:
    """`with progress("encoding", 1000, "texts") as advance:`, and `advance(n)` for every n that are done; a `total` of
    None is not known, the unit "B" counts bytes, `done` are done already.

    On a terminal a bar with rate and remaining time, for what takes more than a second; elsewhere, if `lines`, a line
    every 10 seconds. Nothing on other ranks than the first, with --quiet, or after `be_answering`.
    """
    meter = {"total": total, "unit": unit if unit == "B" else f" {unit}", "unit_scale": unit == "B", "initial": done}
    terminal = sys.stderr.isatty()
    if settings.quiet or settings.answering or RANK or not (terminal or lines):
        yield lambda count=1: None
    elif not terminal:
        yield _Lines(what, meter).update
    else:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own
        with tqdm(desc=what, delay=1, miniters=1, dynamic_ncols=True, leave=None, file=sys.stderr, **meter) as bar:
            settings.bars += 1
            try:
                yield bar.update
            finally:
                settings.bars -= 1


def check_installed(flag: str, requirements: str, *packages: str) -> None:
    """InputError where a package that a flag needs is missing; nothing is imported."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{flag}: {name} is not installed; pip install -r {requirements}")


@contextlib.contextmanager
def reported(what: str, *kinds: type[Exception], remedy: str = "") -> Iterator[None]:
    """An error of these kinds becomes an InputError: `what` is wrong, the first line of the message, and a remedy."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}: {message}{remedy}") from None


def summary(error: BaseException) -> str:
    """What an error says in one line, one of paddle's without the C++ traceback, the kind, the hints and the place."""
    _, traceback, text = str(error).rpartition("Error Message Summary:")
    text = text.lstrip("-\n ") if traceback else text.strip()
    text = re.sub(r"^(\(\w+\)|\w+Error:)\s*", "", text) or type(error).__name__
    return re.sub(r" *\(at /.*", "", text.splitlines()[0]).strip()


def explain(error: Exception) -> str | None:
    """The line about an error that is no mistake of the program's: memory has run out, or CUDA or one of its libraries
    fails; None for any other."""
    said = summary(error)
    if isinstance(error, MemoryError) or re.search("out of memory|ALLOC_FAILED", str(error), re.IGNORECASE):
        flags = " or ".join(settings.memory_flags)
        return f"out of memory: {said}" + (flags and f"; a lower {flags} takes less")
    return f"the GPU cannot be used: {said}" if GPU_TROUBLE.search(said) else None


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`: input errors, no more memory and trouble with CUDA become one line and exit code 2, Ctrl-C
    exit code 130; other errors keep their traceback."""
    code = 0
    try:
        main()
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code or 0
    except BrokenPipeError:  # the reader of stdout (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except InputError as error:
        warn(f"{PROGRAM}: error: {error}")
        code = 2
    except (OSError, MemoryError, RuntimeError, SystemError) as error:  # the last three of paddle
        line = explain(error)
        if line is None and not isinstance(error, OSError):
            raise
        warn(f"{PROGRAM}: error: {line or error}")
        code = 2
    except ModuleNotFoundError as error:
        warn(f"{PROGRAM}: error: {error.name} {HOW_TO_INSTALL}")
        code = 2
    except KeyboardInterrupt:
        warn(f"{PROGRAM}: interrupted")
        code = 130
    if RANKS > 1:
        # With several processes paddle's threads now and then crash while Python ends: all is written, so end here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(text: str) -> str:
    """The text with a blank for every run of tabs and of whatever any program takes for the end of a line."""
    return re.sub(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+", " ", text).strip()


def line(kind: str, **fields: Any) -> str:
    """A line of results: "jsonl" has the fields by name, "tsv" their values between tabs, each in `one_line`, numbers
    of a list between blanks, nothing for None."""
    if kind == "jsonl":  # json leaves these three as they are, and str.splitlines ends a line there
        escapes = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
        return json.dumps(fields, ensure_ascii=False).translate(escapes) + "\n"
    return "\t".join(" ".join(map(str, value)) if isinstance(value, list) else
                     "" if value is None else one_line(str(value)) for value in fields.values()) + "\n"
