"""What the CLI asks of the daemon, and what it answers, over the 0600 unix socket ``control.sock``.

One command a connection, a ``Question`` or a ``Feed``; any may be answered by ``Refused``. A new one is its struct here
(with what answers it), a line in the table of ``control/backend.py`` and a method of the daemon's ``Commands``.
``--json`` prints the reply structs as they are.
"""

from __future__ import annotations

import enum
from typing import Generic, TypeVar, get_args

from epdctl.ids import Incarnation, PhysicalGpu, RankName, RunId, Stage
from epdctl.wire.lifecycle import Endpoints
from epdctl.wire.message import Codec, Message, Part

__all__ = [
    "COMMAND",
    "REPLY",
    "Accepted",
    "CaptureReply",
    "CaptureResult",
    "Command",
    "Done",
    "Down",
    "Event",
    "Feed",
    "FollowLogs",
    "GetEvents",
    "GetHealth",
    "GetStatus",
    "HealthReply",
    "LogLine",
    "Problem",
    "Question",
    "RankState",
    "RankStatus",
    "Refused",
    "Reply",
    "Restart",
    "StartCaptures",
    "StatusReply",
    "StopCaptures",
    "Watch",
    "reply_of",
]

R = TypeVar("R")


class RankState(enum.StrEnum):
    STOPPED = "stopped"
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"


class RankStatus(Part, frozen=True):
    rank: RankName
    stage: Stage
    state: RankState
    reason: str
    since: float  # seconds in this state
    pid: int | None
    incarnation: Incarnation
    restarts: int  # that a fault made necessary
    gpus: list[PhysicalGpu]
    rss_bytes: int | None
    inflight: int | None
    completed: int | None
    endpoints: Endpoints
    restarts_asked: int = 0  # by `restart`, or by a start after the rank had been given up
    leases: int | None = None  # on memory that peers write to; an idle rank has none
    held_pages: int | None = None  # of KV
    transfer: str | None = None  # how its bytes move, and what that was measured to reach at start
    log_tail: list[str] = []  # only when failed
    next_try_s: float | None = None  # only in backoff: seconds until it is started again


class StatusReply(Message, frozen=True):
    schema: int
    cluster: str
    run: RunId
    gateway: str | None
    ranks: list[RankStatus]
    stopping: bool = False  # somebody asked for the end


class Problem(Part, frozen=True):
    rank: RankName | None
    text: str


class HealthReply(Message, frozen=True):
    """``healthy``: every rank serves; ``degraded``: some do not, yet it answers; ``unhealthy``: it does not answer."""

    verdict: str
    problems: list[Problem]
    deep_seconds: float | None = None  # duration of the real request, when one was made


class Accepted(Message, frozen=True):
    ranks: list[RankName]


class LogLine(Message, frozen=True):
    rank: str  # its name, or "daemon"
    incarnation: Incarnation
    text: str


class Event(Message, frozen=True):
    """One line of the event log."""

    at: float  # monotonic seconds since the daemon started
    wall: float  # unix time, for people
    kind: str  # state, exit, capture, command, …
    rank: RankName | None = None
    incarnation: Incarnation | None = None
    state: RankState | None = None
    text: str = ""


class CaptureResult(Part, frozen=True):
    rank: RankName
    path: str | None = None  # of the profiler's trace
    hops: str | None = None  # of what it noted of requests
    error: str | None = None
    note: str | None = None  # why there is no trace, where that is no fault
    clock_offset_us: float | None = None  # of its clock from the supervisor's, give or take …
    clock_uncertainty_us: float | None = None  # … this much: half a round trip


class CaptureReply(Message, frozen=True):
    capture: str
    results: list[CaptureResult]
    merged: str | None = None  # the one trace of all of it, once the capture has ended
    merge_error: str | None = None
    arrows: int = 0  # from rank to rank
    arrows_backwards: int = 0  # of them, against time by more than clocks were uncertain


class Refused(Message, frozen=True):
    """An error, told: the CLI raises it again. ``kind``: the name of its class; one that the CLI does not know is the
    class of its exit status there."""

    text: str
    exit_status: int
    kind: str = ""
    hint: str | None = None


class Done(Message, frozen=True):
    """The stream is complete."""


# --- commands, each with what answers it -----------------------------------------------------------------------------


class Question(Message, Generic[R], frozen=True):
    """A command with one reply, an R."""


class Feed(Message, Generic[R], frozen=True):
    """A command with any number of replies, each an R, and then Done."""


def reply_of(command: Question[R] | Feed[R]) -> type[R]:
    """What the class of ``command`` was declared to be answered with."""
    reply: type[R] = get_args(type(command).__orig_bases__[0])[0]  # type: ignore[union-attr]
    return reply


class GetStatus(Question[StatusReply], frozen=True):
    pass


class GetHealth(Question[HealthReply], frozen=True):
    deep: bool = False  # also a real request through every stage
    budget_s: float = 30.0


class Restart(Question[Accepted], frozen=True):
    ranks: list[str]  # selectors: a rank name, a stage, or "all"


class Down(Feed[Event], frozen=True):
    """Drain, stop and leave. ``force`` skips the drain."""

    drain_s: float | None = None
    force: bool = False


class FollowLogs(Feed[LogLine], frozen=True):
    ranks: list[str] = []  # empty: all; "daemon": the daemon's own
    tail: int | None = 100
    follow: bool = False
    previous: bool = False  # the incarnation before the present one


class Watch(Feed[StatusReply], frozen=True):
    """The status now and again on every change, until the client closes."""


class GetEvents(Feed[Event], frozen=True):
    follow: bool = False
    tail: int | None = None


class StartCaptures(Question[CaptureReply], frozen=True):
    ranks: list[str] = []
    steps: int | None = None
    output: str | None = None  # directory


class StopCaptures(Question[CaptureReply], frozen=True):
    pass


Command = GetStatus | GetHealth | Restart | Down | FollowLogs | Watch | GetEvents | StartCaptures | StopCaptures
Reply = StatusReply | HealthReply | Accepted | LogLine | Event | CaptureReply | Refused | Done

COMMAND: Codec[Command] = Codec(Command)
REPLY: Codec[Reply] = Codec(Reply)
