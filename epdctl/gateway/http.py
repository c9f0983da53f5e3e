"""One HTTP exchange at ASGI's level: a bounded body in, a bounded answer out, and a client that may hang up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Message, Receive, Send

from epdctl.errors import RequestError
from epdctl.gateway.budget import Ticket
from epdctl.gateway.schema import error_body
from epdctl.rank.web import HungUp

__all__ = ["Body", "Speaker", "error_headers"]

SEND_SECONDS = 30.0  # a client that reads nothing for so long has hung up
DISCARD_SECONDS = 5.0
BODY_SECONDS = 30.0  # for a whole body, whatever the request's own deadline
BODY_GRACE = 5.0  # after which a body must have come at this rate, on the average
# What Unicode calls an end of line, and SSE does not: many a client splits there, and is left with half a JSON.
ENDS_OF_LINES = {char.encode(): b"\\u%04x" % ord(char) for char in "\x85\u2028\u2029"}
BODY_RATE = 64 << 10  # bytes a second


def body_deadline(size: int, seconds: float) -> float:
    """Seconds after the first byte by which more than ``size`` bytes must be here. Pure.

    Whoever sends slower holds a place in the queue for nothing.
    """
    return min(seconds, BODY_SECONDS, BODY_GRACE + size / BODY_RATE)


class Body:
    """A request's body, read once, at most ``limit`` bytes of it."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._complete = False
        self._chunks: list[bytes] = []

    async def read(self, ticket: Ticket, seconds: float) -> None:
        """Raises RequestError (408, 413, 429 when the ticket cannot hold it) and HungUp."""
        size, began = 0, asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds) as limit:
                while not self._complete:
                    limit.reschedule(began + body_deadline(size, seconds))
                    chunk = await self._next()
                    size += len(chunk)
                    if size > self._limit:
                        raise RequestError(413, f"the body is larger than {self._limit} bytes", code="body_too_large")
                    ticket.hold(size)
                    self._chunks.append(chunk)
        except TimeoutError as error:
            raise RequestError(408, f"the body stopped or came too slowly, at byte {size}", code="timeout") from error

    def take(self) -> bytes:
        """What was read; it is not kept."""
        chunks, self._chunks = self._chunks, []
        return b"".join(chunks)

    async def discard(self) -> None:
        """Read on for a moment without keeping anything: a client that is still writing when the connection closes
        sees a reset and never the answer."""
        left = 2 * self._limit
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while not self._complete and left > 0:
                    left -= len(await self._next())
        except TimeoutError:
            return

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._complete = True
            raise HungUp
        self._complete = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk


def error_headers(error: RequestError) -> dict[str, str]:
    return {} if error.retry_after is None else {"retry-after": str(error.retry_after)}


class Speaker:
    """Sends one response: either ``whole``, or ``begin``, ``event`` and ``end``. Every send has a deadline."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def whole(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        await self._head(status, {"content-type": "application/json", "content-length": str(len(body)), **headers})
        await self._write({"type": "http.response.body", "body": body})

    async def begin(self, headers: Mapping[str, str]) -> None:
        await self._head(
            200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
        )

    async def event(self, data: bytes) -> None:
        """``data``: JSON, in which these characters stand within strings alone."""
        for bare, escaped in ENDS_OF_LINES.items():
            data = data.replace(bare, escaped)
        await self._write({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def end(self) -> None:
        await self._write({"type": "http.response.body", "body": b""})

    async def refuse(self, error: RequestError) -> None:
        """As the response, or, once a stream has begun, as its last event."""
        body = error_body(error).model_dump_json().encode()
        if self.begun:
            await self.event(body)
            await self.end()
        else:
            await self.whole(error.status, body, error_headers(error))

    async def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.begun = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._write({"type": "http.response.start", "status": status, "headers": raw})

    async def _write(self, message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            raise HungUp from error
