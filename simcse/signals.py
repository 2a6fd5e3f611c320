"""How a script ends on Ctrl-C and on SIGTERM: with exit code 130 or 143, and without a traceback."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

# Exit codes, as a shell has them for SIGINT and SIGTERM.
INTERRUPTED = 130
TERMINATED = 143
SIGNALS = (signal.SIGINT, signal.SIGTERM)
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT_FOLDERS = [os.path.join(PROJECT, folder).rstrip(os.sep)
                  for folder in ("", "scripts", "benchmarks", "deploy/python", "deploy/serving")]


def report_interrupted_imports() -> None:
    """Let Ctrl-C end a script of the project without a traceback while it still imports modules.

    That takes a second, and `console.run` reports an interrupt only from then on. An interrupt is remembered, since
    numpy makes an ImportError of its KeyboardInterrupt. Programs that import simcse as a library are left alone.
    """
    script = os.path.abspath(sys.argv[0])
    is_script = os.path.isfile(script) and os.path.dirname(script) in SCRIPT_FOLDERS
    if not is_script or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
        return
    interrupted = False
    usual_hook = sys.excepthook

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)  # raises KeyboardInterrupt

    def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not interrupted:
            usual_hook(kind, error, traceback)
            return
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED)

    signal.signal(signal.SIGINT, interrupt)
    sys.excepthook = report


def exit_on_sigterm() -> None:
    """Raise SystemExit in the main thread on SIGTERM, so that unfinished files are removed; a second one kills."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _raise_system_exit)


def _raise_system_exit(number: int, _) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(TERMINATED)


def restore_default_handlers() -> None:
    """Let Ctrl-C and SIGTERM end the process at once: all work is done, and a handler would raise at shutdown."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Deliver Ctrl-C and SIGTERM after the context, to the handlers from before it.

    For the import of paddle (2.6 and 3.3), which installs a handler of its own for SIGTERM that prints a C++ stack on
    stdout, and makes an ImportError of Ctrl-C; and for forks, during which Python ignores what a handler raises.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if handler is None or threading.current_thread() is not threading.main_thread():  # None: it is not Python's
        yield
        return
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
