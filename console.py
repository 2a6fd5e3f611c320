"""What a person sees of a running script: one-line errors, log lines, exit codes. Results alone go to stdout."""

import os
import sys
from collections.abc import Callable

HOW_TO_INSTALL = f"is not installed for {sys.executable}; pip install -r requirements.txt, or . .venv/bin/activate"


class InputError(Exception):
    """A mistake in a flag or an input file: reported in one line, exit code 2, no traceback."""


def log(message: str) -> None:
    """Print one line to stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line reports."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`: input errors become one line and exit code 2, Ctrl-C exit code 130."""
    code = _run(main)
    if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) > 1:
        # With several processes paddle's threads now and then crash while Python ends: all is written, so end here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(main: Callable[[], None]) -> int:
    """Run `main`; the exit code."""
    program = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except SystemExit as end:
        return end.code or 0
    except InputError as error:
        log(f"{program}: error: {error}")
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of stdout (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        log(f"{program}: error: {error}")
        return 2
    except ModuleNotFoundError as error:
        log(f"{program}: error: {error.name} {HOW_TO_INSTALL}")
        return 2
    except KeyboardInterrupt:
        log(f"{program}: interrupted")
        return 130
    return 0
