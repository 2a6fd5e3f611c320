"""Reload the folders that the service serves: an index that has been replaced takes over between two requests."""

import argparse
import asyncio
import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from simcse import console

from starlette.types import Receive, Scope, Send

RETRY_SECONDS = 60.0  # between attempts to open what could not be opened; it may have lacked memory for a moment


class IndexChangedError(console.InputError):
    """The index changed while it was being opened, so that what is open may be made of two."""

    def __init__(self) -> None:
        super().__init__("the index changed while it was being opened, and is opened again")


def index_stamp(args: argparse.Namespace) -> tuple | None:
    """Return what changes when something in the index folder is replaced; None: there is no such folder now."""
    if not args.index_path:
        return None
    stamp = []
    try:
        with os.scandir(args.index_path) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    status = entry.stat()
                    stamp.append((entry.name, status.st_ino, status.st_mtime_ns))
    except OSError:
        return None
    return tuple(sorted(stamp)) or None


class Served:
    """A searcher, its app, and the requests that the app is answering."""

    def __init__(self, searcher: Any, app: Any) -> None:
        self.searcher = searcher
        self.app = app
        self._requests = 0
        self._idle = asyncio.Event()
        self._lifespan = app.lifespan()

    async def begin(self) -> None:
        await self._lifespan.__aenter__()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._requests -= 1
            self._idle.set()

    async def end(self, seconds: float) -> None:
        """End when all requests are answered, or after some seconds: a client may have stopped reading its answer."""
        idle = asyncio.create_task(self._wait_until_idle())
        try:
            # asyncio.wait_for loses a cancellation that comes just as its task ends (Python before 3.12).
            await asyncio.wait([idle], timeout=seconds)
        finally:
            idle.cancel()
            await self._lifespan.__aexit__(None, None, None)

    async def _wait_until_idle(self) -> None:
        while self._requests:
            self._idle.clear()
            await self._idle.wait()


class ReloadingApp:
    """An ASGI application that serves a searcher, and another one after SIGHUP or when `stamp` has changed.

    Requests are answered by what was served when they came, whatever takes over meanwhile. Where the next searcher
    cannot be opened, or `stamp` changes while it is opened, one line says so and the old one goes on.

    Args:
        new_searcher: returns a searcher that begins to open. Its `open` waits until it is open, `kill` ends it at once.
        make_app: returns the app of a searcher.
        stamp: returns what is compared; None: there is nothing to compare now.
        patience: seconds that requests to the old searcher have to end.
        seconds: between two comparisons.
        on_outdated: is called with whether what is served is older than what there is.

    Raises:
        Exception: the first searcher cannot be opened.
    """

    def __init__(self, new_searcher: Callable[[], Any], make_app: Callable[[Any], Any],
                 stamp: Callable[[], Any] = lambda: None, patience: float = 60.0, seconds: float = 1.0,
                 on_outdated: Callable[[bool], None] = lambda outdated: None) -> None:
        self._new_searcher = new_searcher
        self._make_app = make_app
        self._stamp = stamp
        self._patience = patience
        self._seconds = seconds
        self._on_outdated = on_outdated
        self._seen: Any = None  # the stamp of what is open
        self._reopen = False
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGHUP, self._on_hangup)
        self.searcher = self._open_first()

    def _on_hangup(self, *_: Any) -> None:
        self._reopen = True  # `_reload_changes` looks at it

    # ------------------------------------------------------------------------------------------------------- opening
    def _begin_opening(self) -> Any:
        """Return a searcher that begins to open what there is now."""
        self._seen = self._stamp()
        return self._new_searcher()

    def _wait_until_open(self, searcher: Any) -> None:
        """Wait until a searcher is open.

        Raises:
            IndexChangedError: the stamp changed meanwhile.
        """
        searcher.open()
        if self._stamp() != self._seen:
            self._seen = None  # so that whatever is there next is opened
            raise IndexChangedError

    def _open_first(self) -> Any:
        """Return an open searcher; it waits, since there is nothing to serve before."""
        while True:
            searcher = self._begin_opening()
            try:
                self._wait_until_open(searcher)
                return searcher
            except IndexChangedError as error:
                console.warn(str(error))
                searcher.close()

    async def _open_next(self) -> Served:
        """Return an open searcher with an app that has begun, while another one is served."""
        searcher = self._begin_opening()
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._wait_until_open, searcher)
            served = Served(searcher, self._make_app(searcher))
            await served.begin()
        except BaseException:  # also when the server ends
            searcher.kill()
            raise
        return served

    # ------------------------------------------------------------------------------------------------------- serving
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._served.answer(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Serve from the start of the application to its end."""
        await receive()  # lifespan.startup
        self._served = Served(self.searcher, self._make_app(self.searcher))
        await self._served.begin()
        reloading = asyncio.create_task(self._reload_changes())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        reloading.cancel()
        await asyncio.wait([reloading])
        await self._served.end(self._patience)
        await send({"type": "lifespan.shutdown.complete"})

    async def _reload_changes(self) -> None:
        """Open again what has changed, until cancelled."""
        retry_at = math.inf
        while True:
            await asyncio.sleep(self._seconds)
            changed = self._stamp() not in (None, self._seen)
            if not (changed or self._reopen or time.monotonic() >= retry_at):
                continue
            self._reopen = False
            self._on_outdated(True)
            try:
                served = await self._open_next()
            except Exception as error:
                expected = isinstance(error, (console.InputError, OSError))
                message = str(error) if expected else f"{type(error).__name__}: {error}"
                console.warn(f"{message}; what was served before goes on")
                retry_at = time.monotonic() + RETRY_SECONDS
                continue
            retry_at = math.inf
            self._on_outdated(False)
            try:
                await self._take_over(served)
            except Exception as error:
                console.warn(f"what was served before could not be closed: {type(error).__name__}: {error}")

    async def _take_over(self, served: Served) -> None:
        before = self._served
        self._served = served
        self.searcher = served.searcher
        facts = self.searcher.facts
        console.log(f"{console.count(facts.documents, 'document')} in {facts.precision} from now on")
        try:
            await before.end(self._patience)
        finally:
            await asyncio.get_running_loop().run_in_executor(None, before.searcher.close)
