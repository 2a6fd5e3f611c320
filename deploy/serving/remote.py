"""A searcher in a process of its own: paddle holds Python's interpreter while it computes, and the server has to go on.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from deploy.serving.jobs import Facts, Job
from simcse import console

# A terminal sends these to both processes; the server acts on them, the process of the model does not.
SIGNALS_OF_SERVER = (signal.SIGINT, signal.SIGHUP)
ENDED = "the process of the model has ended"


def run_searcher(connection: Connection, args: argparse.Namespace) -> None:
    """Open a searcher, send its facts, and answer batches of jobs until the connection closes: the other process."""
    for number in SIGNALS_OF_SERVER:
        signal.signal(number, signal.SIG_IGN)
    console.settings.quiet = args.quiet
    from deploy.serving.opening import open_searcher

    try:
        searcher = open_searcher(args)
    except (console.InputError, ModuleNotFoundError, OSError) as error:
        connection.send(error)
        return
    try:
        console.settings.streaming = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server ends this process when all is answered
        connection.send(searcher.facts)
        while True:
            connection.send(answer_or_error(searcher, connection.recv()))
    except (EOFError, OSError):  # the connection is closed
        searcher.close()


def answer_or_error(searcher: Any, jobs: Sequence[Job]) -> list[Any] | Exception:
    """Return the answers of a searcher, or its error as one that can be sent."""
    try:
        return searcher.answer(jobs)
    except console.InputError as error:
        return error
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")


class RemoteSearcher:
    """A `Searcher` in another process, which begins at once to open what the flags of server.py name.

    Attributes:
        facts: those of the searcher, once it is open.
        ended: whether the other process has ended by itself.
    """

    facts: Facts

    def __init__(self, args: argparse.Namespace) -> None:
        self.ended = False
        self._is_open = False
        self._closing = False
        self._answering = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self._connection, connection_of_process = context.Pipe()
        self._process = context.Process(target=run_searcher, args=(connection_of_process, args), daemon=True)
        # The process inherits the mask, and keeps it until it ignores these signals.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_SERVER)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        connection_of_process.close()

    def open(self) -> None:
        """Wait until the searcher is open.

        Raises:
            InputError: see `open_searcher`; or `kill` has ended the process meanwhile.
            ModuleNotFoundError, OSError: see `open_searcher`.
        """
        try:
            self.facts = self._receive()
            self._is_open = True
        except BaseException:  # also Ctrl-C and SIGTERM
            self.kill()
            raise

    def answer(self, jobs: Sequence[Job]) -> list[Any]:
        """See `Searcher.answer`."""
        with self._answering:
            with contextlib.suppress(OSError):  # `_receive` reports it
                self._connection.send(jobs)
            return self._receive()

    def close(self) -> None:
        """End the process, which may still compute what nobody waits for any more; give back all that it took."""
        self._closing = True
        if self._answering.acquire(timeout=1):
            self._connection.close()
            self._process.join(10)
            self._process.kill()
        else:  # the thread that waits for an answer is told that there will be none
            self._process.kill()
            self._answering.acquire()
            self._connection.close()
        self._process.join()
        self._process.close()

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self._closing = True
        self._process.kill()  # not SIGTERM, which paddle answers with a stack on stdout
        self._process.join()

    def _receive(self) -> Any:
        """Return what the process sends; raise it if it is an error."""
        try:
            received = self._connection.recv()
        except (EOFError, OSError):
            if not self._is_open:
                raise console.InputError(f"{ENDED} while it opened the index; is there enough memory?") from None
            if not self._closing:
                self.ended = True
                os.kill(os.getpid(), signal.SIGTERM)  # without the model there is nothing to serve
            raise RuntimeError(ENDED) from None
        if isinstance(received, Exception):
            raise received
        return received
