"""What surrounds every request: a limit of its body, counting, headers."""

import asyncio
import time
from collections.abc import Callable

from deploy.serving.errors import quote
from deploy.serving.openai_api import error_body

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Read a request's body before the application sees it; refuse one that is too large or comes too slowly.

    A client that is still sending would see a connection reset instead of the answer. So a body that is too large is
    read to its end and discarded, up to DISCARDED times the limit.

    Args:
        size: most bytes of a body.
        seconds: time from its first to its last byte.
    """

    DISCARDED = 8

    def __init__(self, app: ASGIApp, size: int, seconds: float) -> None:
        self.app = app
        self.size = size
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        coding = headers.get(b"content-encoding", b"identity")
        if coding != b"identity":
            name = quote(coding.decode("latin-1"))
            await _refuse(415, f"Content-Encoding: {name} is not supported; send the body uncompressed", scope, receive,
                          send)
            return
        announced_size = int(headers.get(b"content-length", b"0"))
        body = None
        try:
            if announced_size <= self.size * self.DISCARDED:
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
        """Return the body; None where it is too large."""
        body = bytearray()
        size = 0
        more = True
        while more and size <= self.size * self.DISCARDED:
            message = await receive()
            part = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(part)
            if size <= self.size:
                body += part
        return bytes(body) if size <= self.size else None


async def _refuse(status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without reading the rest of the body, and close the connection."""
    response = JSONResponse(error_body(scope["path"], status, message), status, {"Connection": "close"})
    await response(scope, receive, send)


class Watch:
    """Report every request, and add headers to every answer.

    Args:
        on_answer: is called with path, status and seconds. The path is a route's, or "other": paths that clients make
            up would fill the memory.
        headers_of: returns the headers of answers at a path.
    """

    def __init__(self, app: ASGIApp, on_answer: Callable[[str, int, float], None],
                 headers_of: Callable[[str], dict[str, str]]) -> None:
        self.app = app
        self.on_answer = on_answer
        self.headers_of = headers_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(self.headers_of(scope["path"]))
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.on_answer(path, status, time.perf_counter() - started)
