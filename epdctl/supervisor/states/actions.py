"""What the supervisor is to do about a rank, in order: plain values."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from epdctl.ids import Incarnation
from epdctl.supervisor.states.events import Timer

__all__ = [
    "Action",
    "Advertise",
    "Arm",
    "Disarm",
    "DisarmAll",
    "SendDrain",
    "Signal",
    "Spawn",
    "TellGang",
    "Withdraw",
]


@dataclass(frozen=True, slots=True)
class Spawn:
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Signal:
    number: signal.Signals


@dataclass(frozen=True, slots=True)
class SendDrain:
    seconds: float


@dataclass(frozen=True, slots=True)
class Arm:
    """Start this timer, or start it again from zero."""

    timer: Timer
    seconds: float


@dataclass(frozen=True, slots=True)
class Disarm:
    timer: Timer


@dataclass(frozen=True, slots=True)
class DisarmAll:
    pass


@dataclass(frozen=True, slots=True)
class Advertise:
    """Tell the peers of this rank, or what is new about it."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    pass


@dataclass(frozen=True, slots=True)
class TellGang:
    reason: str


Action = Spawn | Signal | SendDrain | Arm | Disarm | DisarmAll | Advertise | Withdraw | TellGang
