"""A daemon that is only its control socket: the real server and wire, answers from a script."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from epdctl.control.paths import ClusterDir, Holder, Record, process_start
from epdctl.control.server import ControlServer
from epdctl.errors import EpdError
from epdctl.ids import Incarnation, RankName, RunId
from epdctl.wire.control import (
    Accepted,
    CaptureReply,
    CaptureResult,
    Down,
    Event,
    FollowLogs,
    GetEvents,
    GetHealth,
    GetStatus,
    HealthReply,
    LogLine,
    RankState,
    Restart,
    StartCaptures,
    StatusReply,
    StopCaptures,
    Watch,
)
from epdctl.wire.message import PROTOCOL
from tests.unit.cli.replies import READY

RUN = READY.run
RANKS = [str(status.rank) for status in READY.ranks]
HEALTHY = HealthReply(verdict="healthy", problems=[])


@dataclass
class Script:
    """What the fake answers, and what it was asked. ``refuse``: raised by every command. ``drains_for_ever``: only a
    forced ``down`` ends."""

    watched: Sequence[StatusReply] = (READY,)
    health: HealthReply = HEALTHY
    captures: Sequence[CaptureResult] = ()
    lines: Sequence[LogLine] = ()
    refuse: EpdError | None = None
    gateway: str | None = "http://127.0.0.1:9"
    drains_for_ever: bool = False
    asked: list[object] = field(default_factory=list)


class FakeDaemon:
    """Implements Backend."""

    def __init__(self, script: Script, directory: ClusterDir) -> None:
        self._script = script
        self._directory = directory
        self._forced = asyncio.Event()

    def _note(self, command: object) -> None:
        self._script.asked.append(command)
        if self._script.refuse is not None:
            raise self._script.refuse

    async def status(self, command: GetStatus) -> StatusReply:
        self._note("status")
        return self._script.watched[-1]

    async def watch(self, command: Watch) -> AsyncGenerator[StatusReply, None]:
        self._note("watch")
        for status in self._script.watched:
            yield status
        await asyncio.Event().wait()  # quiet from here on; the client leaves

    async def health(self, command: GetHealth) -> HealthReply:
        self._note(command)
        return self._script.health

    async def restart(self, command: Restart) -> Accepted:
        self._note(command)
        return Accepted(ranks=[RankName("encoder/0")])

    async def down(self, command: Down) -> AsyncGenerator[Event, None]:
        self._note(command)
        if command.force:
            self._forced.set()
        for state in (RankState.DRAINING, RankState.STOPPED):
            yield Event(
                at=1.0, wall=1.0, kind="state", rank=RankName("encoder/0"), incarnation=Incarnation(1), state=state
            )
            if self._script.drains_for_ever:
                await self._forced.wait()
        shutil.rmtree(self._directory.path, ignore_errors=True)  # two may ask for it

    async def logs(self, command: FollowLogs) -> AsyncGenerator[LogLine, None]:
        self._note(command)
        for line in self._script.lines:
            yield line
        if command.follow:
            await asyncio.Event().wait()

    async def events(self, command: GetEvents) -> AsyncGenerator[Event, None]:
        self._note(command)
        yield Event(at=1.0, wall=1.0, kind="command", text="up")
        if command.follow:
            await asyncio.Event().wait()

    async def start_captures(self, command: StartCaptures) -> CaptureReply:
        self._note(command)
        return CaptureReply(capture="c1", results=list(self._script.captures))

    async def stop_captures(self, command: StopCaptures) -> CaptureReply:
        self._note("stop_captures")
        return CaptureReply(capture="c1", results=list(self._script.captures))


@contextmanager
def running(base: Path, script: Script, name: str = "demo") -> Iterator[ClusterDir]:
    """A cluster ``name`` under the runtime directory ``base``, held by this very process."""
    directory = ClusterDir(base / name)
    directory.path.mkdir(parents=True, mode=0o700)
    start = process_start(os.getpid())
    assert start is not None
    directory.lock.write_bytes(msgspec.json.encode(Holder(os.getpid(), start, RunId(RUN))))
    gateway, state = script.gateway, str(base / "state" / name / RUN)
    record = Record(os.getpid(), start, RUN, PROTOCOL, state, "demo.yaml", gateway, [9], RANKS)
    directory.record.write_bytes(msgspec.json.encode(record))
    loop = asyncio.new_event_loop()
    server = ControlServer(FakeDaemon(script, directory))
    loop.run_until_complete(server.start(directory.control))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield directory
    finally:
        asyncio.run_coroutine_threadsafe(server.close(1.0), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        for task in asyncio.all_tasks(loop):
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
        loop.close()
