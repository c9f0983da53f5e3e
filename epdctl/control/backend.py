"""Whoever answers the commands of the control socket, and the table of which command goes to which of its methods."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

from epdctl.wire.control import (
    Accepted,
    CaptureReply,
    Done,
    Down,
    Event,
    FollowLogs,
    GetEvents,
    GetHealth,
    GetStatus,
    HealthReply,
    LogLine,
    Reply,
    Restart,
    StartCaptures,
    StatusReply,
    StopCaptures,
    Watch,
)
from epdctl.wire.message import Message

__all__ = ["Backend", "Replies", "replies_of"]

C = TypeVar("C", bound=Message)

Replies = Callable[[Any], AsyncGenerator[Reply, None]]  # a command in, all that answers it out


class Backend(Protocol):
    """What the commands mean. Every method may raise EpdError; the generators end when there is no more to say."""

    async def status(self, command: GetStatus) -> StatusReply: ...

    def watch(self, command: Watch) -> AsyncGenerator[StatusReply, None]: ...

    async def health(self, command: GetHealth) -> HealthReply: ...

    async def restart(self, command: Restart) -> Accepted: ...

    def down(self, command: Down) -> AsyncGenerator[Event, None]: ...

    def logs(self, command: FollowLogs) -> AsyncGenerator[LogLine, None]: ...

    def events(self, command: GetEvents) -> AsyncGenerator[Event, None]: ...

    async def start_captures(self, command: StartCaptures) -> CaptureReply: ...

    async def stop_captures(self, command: StopCaptures) -> CaptureReply: ...


def replies_of(backend: Backend) -> Mapping[type[Message], Replies]:
    return dict(
        (
            _question(GetStatus, backend.status),
            _question(GetHealth, backend.health),
            _question(Restart, backend.restart),
            _question(StartCaptures, backend.start_captures),
            _question(StopCaptures, backend.stop_captures),
            _feed(Watch, backend.watch),
            _feed(GetEvents, backend.events),
            _feed(FollowLogs, backend.logs),
            _feed(Down, backend.down),
        )
    )


def _question(kind: type[C], answer: Callable[[C], Awaitable[Reply]]) -> tuple[type[Message], Replies]:
    async def replies(command: C) -> AsyncGenerator[Reply, None]:
        yield await answer(command)

    return kind, replies


def _feed(kind: type[C], told: Callable[[C], AsyncGenerator[Reply, None]]) -> tuple[type[Message], Replies]:
    async def replies(command: C) -> AsyncGenerator[Reply, None]:
        async with contextlib.aclosing(told(command)) as each:
            async for reply in each:
                yield reply
        yield Done()

    return kind, replies
