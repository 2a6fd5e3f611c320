"""The service follows what lies in its folders: what was opened again takes over between two requests."""

import argparse
import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

from simcse import console

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send


def stamp_of(args: argparse.Namespace) -> tuple | None:
    """What is another when something in the index folder has been replaced; None: there is no such folder now."""
    if not args.index_path:
        return None
    try:
        with os.scandir(args.index_path) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return None
    return tuple(sorted((name, status.st_ino, status.st_mtime_ns) for name, status in found)) or None


class _Served:
    """A searcher, its app, and the requests that the app is answering."""

    def __init__(self, searcher: Any, app: FastAPI) -> None:
        self.searcher, self.app, self.requests, self.idle = searcher, app, 0, asyncio.Event()
        self._lifespan = app.router.lifespan_context(app)

    async def begin(self) -> None:
        await self._lifespan.__aenter__()

    async def _finish(self) -> None:
        while self.requests:
            self.idle.clear()
            await self.idle.wait()

    async def end(self, seconds: float) -> None:
        """When all requests are answered, or so long after: a client may have stopped reading its answer."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._finish(), seconds)
        await self._lifespan.__aexit__(None, None, None)


class Following:
    """An ASGI application: the app of the searcher that `open_searcher` gives, and, after SIGHUP or when `stamp` has
    changed, that of one that is opened anew. Requests are answered by what was served when they came, whatever takes
    over meanwhile. Where the new one cannot be opened, the old one goes on, and one line says why.

    Args:
        open_searcher: called here, whose errors are raised, and in a thread later.
        make_app: gives the app of a searcher.
        stamp: gives what is compared, every `seconds`; None: nothing to compare now.
        patience: seconds that requests to what was served before have.
    """

    def __init__(self, open_searcher: Callable[[], Any], make_app: Callable[[Any], FastAPI],
                 stamp: Callable[[], Any] = lambda: None, patience: float = 60.0, seconds: float = 1.0) -> None:
        self._open, self._make_app, self._stamp, self._seconds = open_searcher, make_app, stamp, seconds
        self._patience = patience
        self._hangup, self._seen = asyncio.Event(), stamp()  # before it is opened
        self.searcher = open_searcher()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        served = self._served
        served.requests += 1
        try:
            await served.app(scope, receive, send)
        finally:
            served.requests -= 1
            served.idle.set()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()  # that it starts
        self._served = _Served(self.searcher, self._make_app(self.searcher))
        await self._served.begin()
        with contextlib.suppress(NotImplementedError, RuntimeError):  # no such signal, or not the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hangup.set)
        following = asyncio.create_task(self._follow())
        await send({"type": "lifespan.startup.complete"})
        await receive()  # that it ends
        following.cancel()
        await self._served.end(self._patience)
        await send({"type": "lifespan.shutdown.complete"})

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._hangup.wait(), self._seconds)
            stamp = self._stamp()
            if not self._hangup.is_set() and stamp in (None, self._seen):
                continue
            self._hangup.clear()
            self._seen = stamp
            try:
                searcher = await asyncio.get_running_loop().run_in_executor(None, self._open)
            except Exception as error:
                console.warn(f"{error}; what was served before goes on")
                continue
            await self._take_over(searcher)

    async def _take_over(self, searcher: Any) -> None:
        served = _Served(searcher, self._make_app(searcher))
        await served.begin()
        before, self._served, self.searcher = self._served, served, searcher
        console.log(f"{searcher.facts.documents:,} documents in {searcher.facts.precision} from now on")
        await before.end(self._patience)
        await asyncio.get_running_loop().run_in_executor(None, before.searcher.close)
