"""What a person sees of a running script: log lines, progress and errors on stderr, results on stdout, exit codes."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

from simcse.machine import RANK, RANKS

HOW_TO_INSTALL = f"is not installed for {sys.executable}; pip install -r requirements.txt, or . .venv/bin/activate"
SECONDS_PER_LINE = 10


class InputError(Exception):
    """A mistake in a flag or an input file: reported in one line, exit code 2, no traceback."""


class _Settings:
    quiet = False  # --quiet
    answering = False  # what is written is progress enough
    bars = 0  # progress bars that are on the terminal now


def be_quiet(quiet: bool) -> None:
    """Have `log` and `progress` say nothing, or something again; warnings and errors are said in any case."""
    _Settings.quiet = quiet


def be_answering() -> None:
    """Have `progress` say nothing from here on: lines are being answered as they come."""
    _Settings.answering = True


def log(message: str) -> None:
    """Print one line to stderr, unless --quiet; stdout is for results."""
    if not _Settings.quiet:
        warn(message)


def log_from_handler(message: str) -> None:
    """`log` for a signal handler: past stderr's buffer, which must not be entered again where it is being written to.
    """
    if not _Settings.quiet:
        line_break = "\n" if _Settings.bars else ""  # a bar is left where it is
        os.write(2, f"{line_break}{message}\n".encode())


def warn(message: str) -> None:
    """Print one line to stderr, above the progress bar where there is one."""
    _print(message, sys.stderr)


def result(message: str) -> None:
    """Print one line to stdout, above the progress bar where there is one."""
    _print(message, sys.stdout)


def _print(message: str, file: TextIO) -> None:
    if _Settings.bars:
        from tqdm import tqdm

        tqdm.write(message, file=file)
    else:
        print(message, file=file, flush=True)


class _Lines:
    """Progress where there is no terminal: a line every so many seconds."""

    def __init__(self, what: str, total: int | None, unit: str, done: int) -> None:
        self.what, self.total, self.unit, self.first, self.done = what, total, unit, done, done
        self.started = self.last = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.done += count
        if (now := time.monotonic()) - self.last < SECONDS_PER_LINE:
            return
        from tqdm import tqdm

        self.last = now
        scale = self.unit == "B"
        left = "" if self.total is None else " of {total_fmt} ({percentage:.0f} %)"
        log(tqdm.format_meter(
            self.done, self.total, now - self.started, prefix=self.what, unit=self.unit if scale else f" {self.unit}",
            unit_scale=scale, initial=self.first,
            bar_format="{desc}: {n_fmt}" + left + ", {rate_noinv_fmt}" + (left and ", {remaining} left")))


@contextlib.contextmanager
def progress(what: str, total: int | None, unit: str, lines: bool = True, done: int = 0) -> Iterator[Callable]:
    """`with progress("encoding", 1000, "texts") as advance:`, and `advance(n)` for every n that are done.

    On a terminal a bar with rate and remaining time, for what takes more than a second; elsewhere a line every 10
    seconds. Nothing on other ranks than the first, with --quiet, or after `be_answering`.

    Args:
        total: how many there are in all; None: not known.
        unit: what is counted; "B" counts bytes.
        lines: whether to write lines where there is no terminal.
        done: how many are done already.
    """
    terminal = sys.stderr.isatty()
    if _Settings.quiet or _Settings.answering or RANK or not (terminal or lines):
        yield lambda count=1: None
    elif not terminal:
        yield _Lines(what, total, unit, done).update
    else:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own
        scale = unit == "B"
        with tqdm(desc=what, total=total, unit=unit if scale else f" {unit}", unit_scale=scale, initial=done, delay=1,
                  miniters=1, dynamic_ncols=True, leave=None, file=sys.stderr) as bar:
            _Settings.bars += 1
            try:
                yield bar.update
            finally:
                _Settings.bars -= 1


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line reports."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`: input errors become one line and exit code 2, Ctrl-C exit code 130."""
    code = _run(main)
    if RANKS > 1:
        # With several processes paddle's threads now and then crash while Python ends: all is written, so end here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def program() -> str:
    """The name of the script that runs."""
    return os.path.basename(sys.argv[0])


def _run(main: Callable[[], None]) -> int:
    """Run `main`; the exit code."""
    try:
        main()
        sys.stdout.flush()
    except SystemExit as end:
        return end.code or 0
    except InputError as error:
        warn(f"{program()}: error: {error}")
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of stdout (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        warn(f"{program()}: error: {error}")
        return 2
    except ModuleNotFoundError as error:
        warn(f"{program()}: error: {error.name} {HOW_TO_INSTALL}")
        return 2
    except KeyboardInterrupt:
        warn(f"{program()}: interrupted")
        return 130
    return 0


def some(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _json(**fields) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def recall_lines(kind: str, query: str, documents: Sequence[str], scores: Sequence[float],
                 measure: str = "cosine") -> str:
    """What was recalled for a query, best first: "tsv" is a line a document, "jsonl" a line a query, in which a
    document's score has the name `measure`: "cosine", or "score" where rankings were fused."""
    if kind == "tsv":
        return "".join(f"{query}\t{document}\t{score}\n" for document, score in zip(documents, scores))
    return _json(query=query, results=[{"rank": rank, "document": document, measure: score}
                                       for rank, (document, score) in enumerate(zip(documents, scores), 1)])


def embedding_line(kind: str, text: str, embedding: Sequence[float]) -> str:
    """A text and its embedding: "tsv" has the numbers, separated by blanks, after the tab."""
    if kind == "tsv":
        return f"{text}\t{' '.join(map(str, embedding))}\n"
    return _json(text=text, embedding=embedding)


def pair_line(kind: str | None, query: str, title: str, cosine: float) -> str:
    """A pair and its cosine; None: the cosine alone."""
    if kind == "jsonl":
        return _json(query=query, title=title, cosine=cosine)
    return f"{query}\t{title}\t{cosine}\n" if kind else f"{cosine}\n"


def write(lines: Iterable[str]) -> None:
    """Print `lines` to stdout, where they are at once."""
    sys.stdout.writelines(lines)
    sys.stdout.flush()
