"""Messages over a unix stream: four bytes of length, big-endian, then one encoded message.

Used between a rank and its supervisor and between the CLI and the daemon; both end with the stream's end.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

from epdctl.errors import DeadlineExceeded, PeerGone
from epdctl.wire.message import Codec

__all__ = ["Stream", "connect", "listen"]

_LENGTH = struct.Struct(">I")
SEND_SECONDS = 5.0

In = TypeVar("In")
Out = TypeVar("Out")


class Stream(Generic[In, Out]):
    """One end of a connection. One reader and any number of senders at a time."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Codec[In], outgoing: Codec[Out]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._incoming = incoming
        self._outgoing = outgoing

    def post(self, message: Out) -> None:
        """Queue ``message`` without waiting; a dead peer shows at the next ``send`` or ``receive``."""
        frame = self._outgoing.encode(message)
        self._writer.write(_LENGTH.pack(len(frame)) + frame)

    async def send(self, message: Out, *, seconds: float = SEND_SECONDS) -> None:
        """Raises PeerGone when the other end closed, DeadlineExceeded when it does not read."""
        try:
            async with asyncio.timeout(seconds):
                self.post(message)
                await self._writer.drain()
        except TimeoutError as error:
            raise DeadlineExceeded(f"the other end did not read for {seconds:.0f} s") from error
        except OSError as error:
            raise PeerGone(f"the other end closed: {error}") from error

    async def receive(self) -> In | None:
        """The next message, or None at the end of the stream.

        Raises BadMessage for a frame the schema refuses (the stream goes on) and PeerGone for one whose length is
        beyond the limit or that ends early (the stream is lost).
        """
        inside = False
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > self._incoming.limit:
                raise PeerGone(f"a frame of {length} bytes; the limit is {self._incoming.limit}")
            inside = True
            frame = await self._reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            if error.partial or inside:
                raise PeerGone("the stream ended inside a frame") from error
            return None
        except OSError as error:
            raise PeerGone(f"the other end closed: {error}") from error
        return self._incoming.decode(frame)

    @property
    def backlog(self) -> int:
        """Bytes posted that the other end has not taken; whoever posts without waiting bounds this."""
        return self._writer.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Drop the connection and whatever was queued on it, at once."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Send what is queued, then close; drop it when the other end does not take it in time."""
        self._writer.close()
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._writer.wait_closed()
        except TimeoutError:
            self.abort()
        except OSError:  # it was closed from the other side, which is closed too
            return


async def connect(
    path: str | Path, incoming: Codec[In], outgoing: Codec[Out], *, seconds: float = 5.0
) -> Stream[In, Out]:
    """Raises FileNotFoundError or ConnectionRefusedError when nobody listens, DeadlineExceeded when nobody accepts."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_unix_connection(str(path))
    except TimeoutError as error:
        raise DeadlineExceeded(f"no answer at {path} within {seconds:.0f} s") from error
    return Stream(reader, writer, incoming, outgoing)


async def listen(
    path: Path, incoming: Codec[In], outgoing: Codec[Out], handler: Callable[[Stream[In, Out]], Awaitable[None]]
) -> asyncio.Server:
    """Accept connections at ``path`` (mode 0600), one task of ``handler`` each; the stream is closed after it."""

    loop = asyncio.get_running_loop()
    serving: set[asyncio.Task[None]] = set()

    async def serve(stream: Stream[In, Out]) -> None:
        try:
            await handler(stream)
        finally:
            await stream.close()

    def ended(task: asyncio.Task[None]) -> None:
        serving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            loop.call_exception_handler({"message": f"serving {path} failed", "exception": error, "task": task})

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Tasks of our own: asyncio's report a loop that ends while a connection is open as an error (Python 3.11).
        task = loop.create_task(serve(Stream(reader, writer, incoming, outgoing)))
        serving.add(task)
        task.add_done_callback(ended)

    before = os.umask(0o177)
    try:
        return await asyncio.start_unix_server(accept, str(path))
    finally:
        os.umask(before)
