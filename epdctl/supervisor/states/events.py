"""What happens to a rank: plain values."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from epdctl.ids import Incarnation

__all__ = [
    "DependenciesReady",
    "DrainedReported",
    "Event",
    "Exited",
    "FatalReported",
    "HeartbeatSeen",
    "PeerLost",
    "ReadyReported",
    "RestartRequested",
    "SpawnFailed",
    "StartRequested",
    "StopRequested",
    "Timer",
    "TimerFired",
]


class Timer(enum.Enum):
    START = "start"
    HEARTBEAT = "heartbeat"
    DEAD = "dead"
    DRAIN = "drain"
    KILL = "kill"
    BACKOFF = "backoff"
    STABLE = "stable"
    SICK = "sick"


@dataclass(frozen=True, slots=True)
class StartRequested:
    pass


@dataclass(frozen=True, slots=True)
class StopRequested:
    force: bool = False  # no drain, no SIGTERM


@dataclass(frozen=True, slots=True)
class RestartRequested:
    """Somebody asked for a new process: what went wrong before is forgiven."""


@dataclass(frozen=True, slots=True)
class DependenciesReady:
    """What this rank waits for is there, its whole gang included."""


@dataclass(frozen=True, slots=True)
class PeerLost:
    """Another member of the gang is gone, so this one cannot go on."""

    reason: str


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """The launcher refused: there is no process, and no Exited will come."""

    error: str


@dataclass(frozen=True, slots=True)
class ReadyReported:
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class HeartbeatSeen:
    incarnation: Incarnation
    unhealthy: str | None = None  # the rank's own reason
    standstill: float = 0.0  # seconds that work is under way and nothing has come of it


@dataclass(frozen=True, slots=True)
class FatalReported:
    """Last words: the process leaves by itself after this."""

    incarnation: Incarnation
    text: str
    restartable: bool


@dataclass(frozen=True, slots=True)
class DrainedReported:
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Exited:
    """The process and all it had started are gone. ``reason_text`` replaces the reason made from ``code``."""

    incarnation: Incarnation
    code: int  # exit status, or minus the signal's number
    by: str = "rank"
    reason_text: str | None = None


@dataclass(frozen=True, slots=True)
class TimerFired:
    timer: Timer
    incarnation: Incarnation


Event = (
    StartRequested
    | StopRequested
    | RestartRequested
    | DependenciesReady
    | PeerLost
    | SpawnFailed
    | ReadyReported
    | HeartbeatSeen
    | FatalReported
    | DrainedReported
    | Exited
    | TimerFired
)
