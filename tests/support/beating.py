"""The real loop of a rank's process around a service of a test, and a supervisor that only remembers what it hears."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from epdctl.rank.process import RankProcess
from epdctl.rank.service import Service
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import Fatal, Heartbeat, RankToSupervisor, SupervisorToRank
from tests.support.ranks import News

__all__ = ["Beating", "beating"]

OFTEN = 0.005  # seconds between two beats


class Beating(RankProcess):
    """It beats all the time. ``heard``: by the supervisor."""

    def __init__(self, spec: RankSpec, service: Service) -> None:
        config = msgspec.structs.replace(spec.config, heartbeat_seconds=OFTEN)
        super().__init__(msgspec.structs.replace(spec, config=config), _Stream(self))  # type: ignore[arg-type]
        self.heard: list[RankToSupervisor] = []
        self._news = News()
        self._leaving.add_done_callback(lambda _: self._news.tell())
        self._service, self._ready = service, True
        self._up.set()

    def hear(self, message: RankToSupervisor) -> None:
        self.heard.append(message)
        self._news.tell()

    async def beats(self) -> Heartbeat:
        """The next beat; the rank lives on."""
        before = len(self.heard)
        await self._news.until(lambda: len(self.heard) > before or self._leaving.done())
        assert not self._leaving.done(), f"the rank leaves: {self._leaving.result()}"
        last = self.heard[-1]
        assert isinstance(last, Heartbeat)
        return last

    async def leaves(self) -> Fatal:
        """What the rank says when it goes."""
        await self._news.until(self._leaving.done)
        last = self._leaving.result()
        assert isinstance(last, Fatal)
        return last


class _Stream:
    """A Stream, as far as a rank that beats uses it."""

    def __init__(self, process: Beating) -> None:
        self._process = process

    def post(self, message: RankToSupervisor) -> None:
        self._process.hear(message)

    async def send(self, message: RankToSupervisor, *, seconds: float = 0.0) -> None:
        self._process.hear(message)

    async def receive(self) -> SupervisorToRank | None:
        await asyncio.Event().wait()
        return None

    async def close(self) -> None:
        pass


@asynccontextmanager
async def beating(spec: RankSpec, service: Service) -> AsyncIterator[Beating]:
    loop = asyncio.get_running_loop()
    process, handler = Beating(spec, service), loop.get_exception_handler()
    loop.set_exception_handler(process._unhandled)
    process._tasks.start(process._beat(), "heartbeat")
    try:
        yield process
    finally:
        await process._tasks.close()
        loop.set_exception_handler(handler)
