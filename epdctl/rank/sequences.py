"""One request's stay on a rank with a language model: its phase, what it holds, and who still uses that.

    WAITING ──► GRANTED ──► RUNNING        WAITING holds nothing. GRANTED holds everything it will ever need.
       │           │           │           RUNNING: the engine has it.
       └───────────┴───────────┴──► LEAVING ──► GONE

LEAVING: its story is over for the gateway, yet the step in flight, or a write to a peer, may still touch its memory.
Memory is free again only at GONE, and GONE is reached only when nobody uses it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from epdctl.ids import RequestId
from epdctl.rank.admission import Need
from epdctl.telemetry.hops import Way
from epdctl.transfer.leases import Lease
from epdctl.wire.sockets import Sender

__all__ = ["HOP_OF", "TRANSITIONS", "Grant", "Phase", "Stay", "User", "stay_name"]


def stay_name(request: RequestId, attempt: int) -> str:
    """One attempt of one request: the key of a rank's table, and the engine's name for its sequence."""
    return f"{request}#{attempt}"


class Phase(enum.StrEnum):
    WAITING = "waiting"
    GRANTED = "granted"
    RUNNING = "running"
    LEAVING = "leaving"
    GONE = "gone"


TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.WAITING: frozenset({Phase.GRANTED, Phase.LEAVING}),
    Phase.GRANTED: frozenset({Phase.RUNNING, Phase.LEAVING}),
    Phase.RUNNING: frozenset({Phase.LEAVING}),
    Phase.LEAVING: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}


# What a trace calls them: GRANTED lasts until what was leased has landed, embeddings or KV.
HOP_OF: Mapping[Phase, str] = {
    Phase.WAITING: "waiting",
    Phase.GRANTED: "landing",
    Phase.RUNNING: "running",
    Phase.LEAVING: "leaving",
}


class User(enum.StrEnum):
    """Who may be touching the memory of a sequence right now."""

    ENGINE = "engine"
    WRITES = "writes"


@dataclass(frozen=True, slots=True)
class Grant:
    """Pages of the KV pool; and what peers may write to: a slot per embedding, or on a decode rank the pages."""

    pages: Sequence[int]
    leases: Sequence[Lease] = ()


@dataclass(slots=True, kw_only=True, eq=False)
class Stay:
    """Owned by the event loop. Services extend it with what their half of the work needs."""

    request: RequestId
    attempt: int
    sender: Sender  # the gateway's link
    need: Need
    epoch: int = 0  # of this rank's place in the table, when this was asked
    prompt_tokens: int
    sampled: int = 0  # tokens of the answer so far
    ends_at: float  # on the loop's clock
    alarm: asyncio.TimerHandle | None = None
    phase: Phase = Phase.WAITING
    grant: Grant | None = None
    users: set[User] = field(default_factory=set)
    way: Way | None = None  # from the door to GONE

    @property
    def name(self) -> str:
        return stay_name(self.request, self.attempt)

    def enter(self, phase: Phase) -> None:
        """Raises ValueError, and changes nothing, for a step that the table does not have."""
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"{self.name} cannot go from {self.phase} to {phase}")
        self.phase = phase
        if self.way is not None:
            if phase is Phase.GONE:
                self.way.end()
            else:
                self.way.enter(HOP_OF[phase])

    @property
    def over(self) -> bool:
        """Nothing is told about it any more."""
        return self.phase in (Phase.LEAVING, Phase.GONE)

    def holding(self) -> Grant:
        """What it was granted. Raises ValueError while it waits."""
        if self.grant is None:
            raise ValueError(f"{self.name} holds nothing while it is {self.phase}")
        return self.grant
