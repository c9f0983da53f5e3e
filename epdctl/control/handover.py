"""What ``up`` hands the daemon through its standard input, and the one answer that comes back."""

from __future__ import annotations

from epdctl.ids import RunId
from epdctl.topology.plan import Plan
from epdctl.wire.control import Refused
from epdctl.wire.message import Codec, Message

__all__ = ["CUT_LOOSE", "HANDOVER", "OUTCOME", "Handover", "Outcome", "Started"]

CUT_LOOSE = b"."  # on the lifeline: its end is no longer the daemon's


class Handover(Message, frozen=True):
    plan: Plan
    run: RunId
    state_dir: str  # of this run; made by whoever starts the daemon, because it holds the daemon's own log


class Started(Message, frozen=True):
    """The control socket answers."""


Outcome = Started | Refused

HANDOVER: Codec[Handover] = Codec(Handover)
OUTCOME: Codec[Outcome] = Codec(Outcome)
