"""What a user sees of a running script: log lines, progress and errors on stderr, results on stdout, exit codes."""

import contextlib
import errno
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from simcse.machine import RANK, RANKS
from simcse.signals import INTERRUPTED, exit_on_sigterm, restore_default_handlers

PROGRAM = os.path.basename(sys.argv[0])  # the script that runs
HOW_TO_INSTALL = f"is not installed for {sys.executable}; pip install -r requirements.txt, or . .venv/bin/activate"
SECONDS_PER_LINE = 10  # between two lines of progress where stderr is no terminal
# Exit codes: 2 for what the user can correct, the other as a shell has it for SIGPIPE.
USAGE_ERROR = 2
BROKEN_PIPE = 141
OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED", re.IGNORECASE)
GPU_TROUBLE = re.compile(r"\b(CUDA|CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CURAND|CUFFT|NCCL) error|third-party dynamic library|"
                         "Unsupported GPU architecture", re.IGNORECASE)
# Every character that some program takes for the end of a line, and the tab, which separates columns.
LINE_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
# json.dumps leaves these as they are, but str.splitlines ends a line at each of them.
JSON_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


class InputError(Exception):
    """A mistake in a flag or an input file: reported in one line, exit code 2, no traceback."""


class NotFiniteError(InputError):
    """The model gives NaN or Inf: a mistake in the checkpoint, whatever the text is."""


@dataclass
class Settings:
    """What the flags of the running script say about its output and about the lines that it reads.

    Attributes:
        quiet: --quiet, no log lines and no progress.
        strict_data: --strict_data, wrong data is an error instead of a warning.
        plain_text: --plain_text, files are read as lines of text without a guess at their format.
        streaming: the script answers lines as they arrive, and its answers are progress enough.
        memory_flags: the flags of the script that a user can lower when memory runs out.
    """

    quiet: bool = False
    strict_data: bool = False
    plain_text: bool = False
    streaming: bool = False
    memory_flags: Sequence[str] = ()


settings = Settings()
_open_bars = 0  # progress bars that are on the terminal now


# ----------------------------------------------------------------------------------------------------- lines of text
def log(message: str) -> None:
    """Print one line to stderr, unless --quiet."""
    if not settings.quiet:
        _print_line(message, sys.stderr)


def log_from_handler(message: str) -> None:
    """Print one line to stderr from a signal handler, unless --quiet.

    It writes past the buffer of sys.stderr, which may be in use when the signal arrives, and below a progress bar.
    """
    if settings.quiet:
        return
    line = f"{message}\n"
    if _open_bars:
        line = f"\n{line}"
    os.write(2, line.encode())


def warn(message: str) -> None:
    """Print one line to stderr, with --quiet, too."""
    _print_line(message, sys.stderr)


def warn_data(message: str) -> None:
    """Warn of something wrong with the data.

    Raises:
        InputError: --strict_data is set.
    """
    if settings.strict_data:
        raise InputError(f"{message} (--strict_data)")
    warn(message)


def print_result(message: str) -> None:
    """Print one line to stdout."""
    _print_line(message, sys.stdout)


def _print_line(message: str, file: TextIO) -> None:
    """Print one line to stdout or stderr, above the progress bar if there is one."""
    if _open_bars:
        from tqdm import tqdm

        tqdm.write(message, file=file)
    else:
        print(message, file=file, flush=True)


@contextlib.contextmanager
def accept_all_lines() -> Iterator[None]:
    """Read files as if --plain_text were set and --strict_data were not.

    An index keeps a copy of its corpus. That file was accepted when the index was built, and has to be accepted again,
    whatever the flags are now.
    """
    strict_data = settings.strict_data
    plain_text = settings.plain_text
    settings.strict_data = False
    settings.plain_text = True
    try:
        yield
    finally:
        settings.strict_data = strict_data
        settings.plain_text = plain_text


def count(number: int, noun: str) -> str:
    """Return a number with its noun, as in "1,000 texts" or "2 queries"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


# Of plural verbs.
SINGULAR = {"are": "is", "count": "counts", "have": "has", "match": "matches", "need": "needs", "repeat": "repeats",
            "stand": "stands"}


def verb(number: int, plural: str) -> str:
    """Return a verb in the form that a number needs, as in "1 is" or "2 are"."""
    return SINGULAR[plural] if number == 1 else plural


def part(number: int, total: int, noun: str, plural_verb: str) -> str:
    """Return how many of all, with their verb, as in "1 of 1,000 texts is" or "2 of 2 queries are"."""
    return f"{number:,} of {count(total, noun)} {verb(number, plural_verb)}"


def some(names: Sequence[str], most: int = 12) -> str:
    """Return the first names, separated by commas, and how many more there are."""
    listed = ", ".join(names[:most])
    if len(names) > most:
        return f"{listed} and {len(names) - most} more"
    return listed


def some_characters(text: str, most: int = 40) -> str:
    """Return the first characters of a text, with an ellipsis where there are more."""
    return text if len(text) <= most else f"{text[:most]}..."


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; it cannot if it has half of a surrogate pair, as JSON may."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: str) -> str:
    """Return the text on one line: a blank replaces every run of tabs and line breaks."""
    return LINE_BREAKS.sub(" ", text).strip()


def line(kind: str, **fields: Any) -> str:
    """Return a line of results, with its line break.

    Args:
        kind: "jsonl" for an object with the fields' names, "tsv" for their values between tabs.
        fields: values by name. In tsv a list has blanks between its values, and None is an empty column.
    """
    if kind == "jsonl":
        return json.dumps(fields, ensure_ascii=False).translate(JSON_LINE_BREAKS) + "\n"
    if kind == "tsv":
        return "\t".join(_tsv_cell(value) for value in fields.values()) + "\n"
    raise ValueError(kind)


def _tsv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return one_line(str(value))


# ---------------------------------------------------------------------------------------------------------- progress
class _ProgressLines:
    """Log a line every SECONDS_PER_LINE: the progress on a stderr that is no terminal."""

    def __init__(self, what: str, meter: dict[str, Any]) -> None:
        self.what = what
        self.meter = meter  # arguments of tqdm.format_meter
        self.done = meter["initial"]
        self.started = time.monotonic()
        self.logged = self.started

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.logged < SECONDS_PER_LINE:
            return
        from tqdm import tqdm

        self.logged = now
        if self.meter["total"] is None:
            shape = "{desc}: {n_fmt}, {rate_noinv_fmt}"
        else:
            shape = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {rate_noinv_fmt}, {remaining} left"
        log(tqdm.format_meter(self.done, elapsed=now - self.started, prefix=self.what, bar_format=shape, **self.meter))


@contextlib.contextmanager
def _progress_bar(what: str, meter: dict[str, Any]) -> Iterator[Callable]:
    """Show a bar on the terminal once a second has passed, and yield the function that advances it."""
    global _open_bars
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    with tqdm(desc=what, delay=1, miniters=1, dynamic_ncols=True, leave=None, file=sys.stderr, **meter) as bar:
        _open_bars += 1
        try:
            yield bar.update
        finally:
            _open_bars -= 1


@contextlib.contextmanager
def progress(what: str, total: int | None, unit: str, lines: bool = True, done: int = 0) -> Iterator[Callable]:
    """Show how far a loop is: `with progress("encoding", 1000, "texts") as advance:`, then `advance(n)` every n texts.

    A terminal gets a bar, another stderr a line every 10 seconds. Nothing is shown on ranks other than the first, with
    --quiet, and while the script answers lines as they arrive.

    Args:
        what: the name of the work, a participle.
        total: how many units there are; None where that is not known.
        unit: a plural; "B" counts bytes.
        lines: print lines where stderr is no terminal.
        done: units that are done already.
    """
    in_bytes = unit == "B"
    meter = {"total": total, "unit": unit if in_bytes else f" {unit}", "unit_scale": in_bytes, "initial": done}
    if settings.quiet or settings.streaming or RANK:
        yield lambda count=1: None
    elif sys.stderr.isatty():
        with _progress_bar(what, meter) as advance:
            yield advance
    elif lines:
        yield _ProgressLines(what, meter).update
    else:
        yield lambda count=1: None


# ------------------------------------------------------------------------------------------------------------ errors
def check_installed(flag: str, requirements: str, *packages: str) -> None:
    """Raise InputError if a package that a flag needs is missing, without importing it."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{flag}: {name} is not installed; pip install -r {requirements}")


@contextlib.contextmanager
def as_input_error(what: str, *kinds: type[Exception], remedy: str = "") -> Iterator[None]:
    """Raise an InputError instead of an error of some kinds: "`what`: first line of the error's message`remedy`".

    Args:
        what: the flag or file, and what is wrong with it.
        kinds: exceptions that the user can correct; all others pass.
        remedy: what to do, with the "; " before it.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}: {message}{remedy}") from None


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error's message.

    Of paddle's messages that is the one line that tells what is wrong. They have a C++ traceback, a summary that begins
    with the kind of the error and ends with a place in the source, and hints.
    """
    _, traceback, text = str(error).rpartition("Error Message Summary:")
    text = text.lstrip("-\n ") if traceback else text.strip()
    text = re.sub(r"^(\(\w+\)|\w+Error:)\s*", "", text)  # the kind: "(External)" or "OSError:"
    if not text:
        return type(error).__name__
    first_line = text.splitlines()[0]
    return re.sub(r" *\(at /.*", "", first_line).strip()  # the place: "(at /paddle/...cc:37)"


def describe_machine_error(error: Exception) -> str | None:
    """Return one line about an error of the machine: no memory left, or CUDA or one of its libraries fails.

    Returns:
        None for any other error.
    """
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        message = f"out of memory: {summarize_error(error)}"
        if settings.memory_flags:
            message += f"; a lower {' or '.join(settings.memory_flags)} takes less"
        return message
    if GPU_TROUBLE.search(summarize_error(error)):
        return f"the GPU cannot be used: {summarize_error(error)}"
    return None


def run(main: Callable[[], None]) -> None:
    """Run a script's `main` and exit.

    What the user can correct becomes one line and exit code 2: input errors, missing files and packages, no memory
    left, trouble with CUDA. Ctrl-C is exit code 130, SIGTERM 143. Other errors keep their traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the script
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    sys.stdout.reconfigure(encoding="utf-8")  # results are UTF-8, whatever the locale
    if RANKS == 1:  # a rank may wait for others in paddle, where no handler runs: the signal itself ends it
        exit_on_sigterm()
    code = 0
    try:
        main()
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code or 0
    except BrokenPipeError:  # the reader of stdout (head, less) has ended
        _discard_stdout()
        code = BROKEN_PIPE
    except InputError as error:
        _print_error(str(error))
        code = USAGE_ERROR
    except (OSError, MemoryError, RuntimeError, SystemError) as error:  # paddle raises the last three
        _report_machine_error(error)
        code = USAGE_ERROR
    except ModuleNotFoundError as error:
        _print_error(f"{error.name} {HOW_TO_INSTALL}")
        code = USAGE_ERROR
    except KeyboardInterrupt:
        restore_default_handlers()  # from here on, a second Ctrl-C ends the process
        warn(f"{PROGRAM}: interrupted")
        code = INTERRUPTED
    restore_default_handlers()
    if RANKS > 1:
        # With several processes paddle's threads now and then crash while Python shuts down. All is written by now.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _report_machine_error(error: Exception) -> None:
    """Print an error of the machine or the system; raise it if it is neither, but a mistake of the program."""
    message = describe_machine_error(error)
    if message is None and not isinstance(error, OSError):
        raise error
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # files that a flag names are `files.name_output`'s
        message = "no space left on the disk of stdout, or of temporary files"
        _discard_stdout()
    _print_error(message or str(error))


def _discard_stdout() -> None:
    """Let what is left of stdout go nowhere, so that flushing it at the end of the process does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str) -> None:
    warn(f"{PROGRAM}: error: {message}")
