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

CHANGED = "the index changed while it was being opened, and is opened again"


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
    """An ASGI application: the app of the searcher that `new_searcher` gives, and, after SIGHUP or when `stamp` has
    changed, that of another one. Requests are answered by what was served when they came, whatever takes over
    meanwhile. Where the new one cannot be opened, the old one goes on, and one line says why; so it does where `stamp`
    changes while the new one is opened, which may then be made of two.

    Args:
        new_searcher: gives one whose `open` waits until it is open, which `kill` ends; errors of the first are raised.
        make_app: gives the app of a searcher.
        stamp: gives what is compared, every `seconds`; None: nothing to compare now.
        patience: seconds that requests to what was served before have.
    """

    def __init__(self, new_searcher: Callable[[], Any], make_app: Callable[[Any], FastAPI],
                 stamp: Callable[[], Any] = lambda: None, patience: float = 60.0, seconds: float = 1.0) -> None:
        self._new, self._make_app, self._stamp, self._seconds = new_searcher, make_app, stamp, seconds
        self._patience, self._hangup = patience, (hangup := asyncio.Event())
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGHUP, lambda *_: hangup.set())  # acted on when the first one is served
        while True:
            self._seen = stamp()
            self.searcher = new_searcher()
            self.searcher.open()
            if stamp() == self._seen:
                break
            console.warn(CHANGED)
            self.searcher.close()

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
        await asyncio.wait([following])
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
                served = await self._open()
            except Exception as error:
                kind = "" if isinstance(error, (console.InputError, OSError)) else f"{type(error).__name__}: "
                console.warn(f"{kind}{error}; what was served before goes on")
                continue
            await self._take_over(served)

    async def _open(self) -> _Served:
        """What can take over: opened anew, with an app that has begun."""
        searcher = self._new()
        try:
            await asyncio.get_running_loop().run_in_executor(None, searcher.open)
            if self._stamp() != self._seen:
                self._seen = None  # whatever is there next, it is opened
                raise console.InputError(CHANGED)
            served = _Served(searcher, self._make_app(searcher))
            await served.begin()
        except BaseException:  # that the server ends, too
            searcher.kill()
            raise
        return served

    async def _take_over(self, served: _Served) -> None:
        before, self._served, self.searcher = self._served, served, served.searcher
        facts = self.searcher.facts
        console.log(f"{facts.documents:,} documents in {facts.precision} from now on")
        try:
            await before.end(self._patience)
        finally:
            await asyncio.get_running_loop().run_in_executor(None, before.searcher.close)
