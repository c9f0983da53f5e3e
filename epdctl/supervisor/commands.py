"""What each control command means for the daemon: the ``Backend`` of the control server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial

from epdctl.control.select import select, select_logs
from epdctl.supervisor import health
from epdctl.supervisor.daemon import Daemon
from epdctl.supervisor.logs import read_logs
from epdctl.wire.control import (
    Accepted,
    CaptureReply,
    Down,
    Event,
    FollowLogs,
    GetEvents,
    GetHealth,
    GetStatus,
    HealthReply,
    LogLine,
    Restart,
    StartCaptures,
    StatusReply,
    StopCaptures,
    Watch,
)

__all__ = ["Commands"]

COALESCE_SECONDS = 0.1  # between two statuses that a watcher is sent


class Commands:
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def status(self, command: GetStatus) -> StatusReply:
        return self._daemon.status()

    async def watch(self, command: Watch) -> AsyncGenerator[StatusReply, None]:
        """Ends with the cluster."""
        daemon = self._daemon
        while not daemon.events.closed:
            heard = daemon.changed.rings
            yield daemon.status()
            await asyncio.sleep(COALESCE_SECONDS)
            await daemon.changed.wait(heard)

    async def health(self, command: GetHealth) -> HealthReply:
        def shallow() -> HealthReply:
            return health.verdict(self._daemon.status().ranks)

        if not command.deep:
            return shallow()
        prove = partial(self._daemon.proofs.ask, health.seeing(self._daemon.status().ranks))
        return await health.deep(self._daemon.plan, shallow, command.budget_s, prove)

    async def restart(self, command: Restart) -> Accepted:
        ranks = select(command.ranks or ["all"], self._daemon.ranks)
        return Accepted(ranks=self._daemon.restart(ranks))

    async def down(self, command: Down) -> AsyncGenerator[Event, None]:
        """The events of the stop, to the last. It goes on to its end without the one who asked."""
        events = self._daemon.events
        before = events.count
        self._daemon.stop(command.drain_s, command.force)  # whose first events are there when this returns
        async for event in events.read(follow=True, tail=events.count - before):
            yield event

    def logs(self, command: FollowLogs) -> AsyncGenerator[LogLine, None]:
        ranks = select_logs(command.ranks, self._daemon.ranks)
        return read_logs(self._daemon.rundir.state.logs, ranks, command, lambda: self._daemon.events.closed)

    def events(self, command: GetEvents) -> AsyncGenerator[Event, None]:
        return self._daemon.events.read(follow=command.follow, tail=command.tail)

    async def start_captures(self, command: StartCaptures) -> CaptureReply:
        ranks = select(command.ranks, self._daemon.ranks)
        return self._daemon.captures.start(command, ranks)

    async def stop_captures(self, command: StopCaptures) -> CaptureReply:
        return await self._daemon.captures.stop()
