"""What surrounds every request: a bound on its body, figures, headers."""

import asyncio
import time
from collections.abc import Callable

from deploy.serving.openai_api import error_of

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Reads a request's body before the application sees it, and refuses one that is too large or comes too slowly.

    A client that is still sending would not see the answer, but a connection reset: what is too large is read to its
    end and thrown away, up to `_THROWN_AWAY` times the size.

    Args:
        size: bytes.
        seconds: from the first to the last of them.
    """

    _THROWN_AWAY = 32

    def __init__(self, app: ASGIApp, size: int, seconds: float) -> None:
        self.app, self.size, self.seconds = app, size, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = int(dict(scope["headers"]).get(b"content-length", b"0"))
        body = None
        try:
            if told <= self.size * self._THROWN_AWAY:
                body = await asyncio.wait_for(self._read(receive), self.seconds)
        except asyncio.TimeoutError:
            await _refuse(408, f"the body did not come within {self.seconds:g} s", scope, receive, send)
            return
        if body is None:
            await _refuse(413, f"a body may have {self.size:,} bytes", scope, receive, send)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where it is too large."""
        body, size, more = bytearray(), 0, True
        while more and size <= self.size * self._THROWN_AWAY:
            message = await receive()
            size += len(part := message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.size:
                body += part
        return bytes(body) if size <= self.size else None


async def _refuse(status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
    # What is left of the body is not read: the connection ends.
    await JSONResponse(error_of(scope["path"], status, message), status, {"Connection": "close"})(scope, receive, send)


class Watch:
    """Tells of every request its path, status and seconds, and gives every answer headers.

    Args:
        tell: gets path, status and seconds; the path is a route's, or "other": clients could make up names without end.
        headers: gives the headers of a path.
    """

    def __init__(self, app: ASGIApp, tell: Callable[[str, int, float], None],
                 headers: Callable[[str], dict[str, str]]) -> None:
        self.app, self.tell, self.headers = app, tell, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(self.headers(scope["path"]))
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.tell(path, status, time.perf_counter() - started)
