"""The socket that ranks connect to: admits the incarnation it was told to expect, and nobody else.

A bad frame is counted, logged and dropped; it never ends the connection's task.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Protocol

from epdctl.errors import BadMessage, WireError
from epdctl.supervisor.member import RankStream
from epdctl.wire.lifecycle import RANK_TO_SUPERVISOR, SUPERVISOR_TO_RANK, Hello, RankToSupervisor
from epdctl.wire.stream import listen

__all__ = ["Host", "Reception"]

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0


class Host(Protocol):
    def greet(self, hello: Hello, stream: RankStream) -> str | None:
        """Let this incarnation in; the reason why not, otherwise."""
        ...

    def hear(self, hello: Hello, message: RankToSupervisor) -> None: ...

    def leaving(self, hello: Hello) -> bool:
        """It was told to go: however its stream ends, that is its end."""
        ...

    def hung_up(self, hello: Hello) -> None: ...


class Reception:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._server: asyncio.Server | None = None
        self._guests: set[asyncio.Task[None]] = set()
        self.bad_frames = 0

    async def start(self, path: Path) -> None:
        self._server = await listen(path, RANK_TO_SUPERVISOR, SUPERVISOR_TO_RANK, self._receive)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._guests:
            task.cancel()

    async def _receive(self, stream: RankStream) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._guests.add(task)
        try:
            hello = await self._admit(stream)
            if hello is not None:
                await self._listen(hello, stream)
        finally:
            stream.abort()  # whatever was not read by a process that is gone stays unread
            self._guests.discard(task)

    async def _admit(self, stream: RankStream) -> Hello | None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                first = await stream.receive()
        except (WireError, TimeoutError) as error:
            self._bad(f"a connection that did not begin with Hello: {str(error) or 'it said nothing'}")
            return None
        if first is None:  # somebody looked whether we listen
            return None
        if not isinstance(first, Hello):
            self._bad(f"a connection that began with {type(first).__name__} instead of Hello")
            return None
        if refusal := self._host.greet(first, stream):
            self._bad(f"a Hello of {first.rank}, incarnation {first.incarnation}: {refusal}")
            return None
        return first

    async def _listen(self, hello: Hello, stream: RankStream) -> None:
        """Until the stream ends, however many bad frames are in it: one that only makes noise has no heartbeat."""
        try:
            while True:
                try:
                    message = await stream.receive()
                except BadMessage as error:
                    self._bad(f"a frame of {hello.rank}: {error.message}")
                    continue
                if message is None:
                    return
                self._host.hear(hello, message)
        except WireError as error:
            if not self._host.leaving(hello):
                self._bad(f"the rest of {hello.rank}'s stream: {error.message}")
        finally:
            self._host.hung_up(hello)

    def _bad(self, what: str) -> None:
        """Each power of two is logged: the first ones in full, a flood without filling the disk."""
        self.bad_frames += 1
        if self.bad_frames & (self.bad_frames - 1) == 0:
            log.warning("dropped %s (%d dropped so far)", what, self.bad_frames)
