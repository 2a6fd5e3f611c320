"""The searcher in a process of its own: paddle holds Python's interpreter while it computes, and the server has to go
on answering then."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from deploy.serving.batching import Job
from simcse import console

OF_THE_SERVER = (signal.SIGINT, signal.SIGHUP)  # a terminal sends them to both processes, and the server acts on them


def _answer(connection: Connection, args: argparse.Namespace) -> None:
    """The other process: opens what the flags name, tells of it, and answers batches until nobody asks any more."""
    for number in OF_THE_SERVER:
        signal.signal(number, signal.SIG_IGN)
    console.settings.quiet = args.quiet
    from deploy.serving.searcher import open_searcher

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
            jobs = connection.recv()
            try:
                connection.send(searcher.answer(jobs))
            except console.InputError as error:
                connection.send(error)
            except Exception as error:
                connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
    except (EOFError, OSError):  # of the connection
        searcher.close()


class RemoteSearcher:
    """A `Searcher` of server.py's flags, in another process, which begins at once to open what they name."""

    def __init__(self, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, args), daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_SERVER)  # which it has until it ignores them
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self._answering, self._closing = threading.Lock(), False
        self._opened = self.ended = False  # by itself

    def open(self) -> None:
        """Wait until all is open; then there are its `facts`, and it answers.

        Raises:
            InputError, ModuleNotFoundError, OSError: see `open_searcher`; the first where `kill` ends it meanwhile.
        """
        try:
            self.facts = self._receive()
            self._opened = True
        except BaseException:  # Ctrl-C and SIGTERM, too
            self.kill()
            raise

    def kill(self) -> None:
        """End the other process at once, whatever it does."""
        self._closing = True
        self._process.kill()  # not SIGTERM, which paddle answers with a stack on stdout

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
        except (EOFError, OSError):
            said = "the process of the model has ended"
            if not self._opened:
                raise console.InputError(f"{said} while it opened the index; is there enough memory?") from None
            if not self._closing:
                self.ended = True
                os.kill(os.getpid(), signal.SIGTERM)  # without it there is nothing to serve
            raise RuntimeError(said) from None
        if isinstance(received, Exception):
            raise received
        return received

    def answer(self, jobs: list[Job]) -> list[Any]:
        """See `Searcher.answer`."""
        with self._answering:
            with contextlib.suppress(OSError):  # of which `_receive` tells
                self._connection.send(jobs)
            return self._receive()

    def close(self) -> None:
        """End the other process; it may still compute what nobody waits for any more."""
        self._closing = True
        if self._answering.acquire(timeout=1):
            self._connection.close()
            self._process.join(10)
        self._process.kill()
