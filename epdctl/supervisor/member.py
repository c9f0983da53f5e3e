"""One rank as the daemon holds it: its place in the plan, its state, and the process it has at the moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from epdctl.ids import Incarnation, RankName
from epdctl.launch.base import Exit, Handle
from epdctl.supervisor.states.events import Timer
from epdctl.supervisor.states.rank import Rank, initial
from epdctl.topology.plan import PlannedRank
from epdctl.wire.lifecycle import Endpoints, Facts, Heartbeat, Loading, RankToSupervisor, SupervisorToRank
from epdctl.wire.stream import Stream

__all__ = ["Life", "Member", "RankStream"]

RankStream = Stream[RankToSupervisor, SupervisorToRank]


@dataclass(slots=True)
class Life:
    """One incarnation, from its spawn to its exit. ``stream`` stands from its Hello to its hang-up."""

    incarnation: Incarnation
    handle: Handle | None = None
    stream: RankStream | None = None
    loading: Loading | None = None
    beat: Heartbeat | None = None
    endpoints: Endpoints = field(default_factory=Endpoints)
    facts: Facts | None = None  # what it said at Ready; others are compared with it
    transfer: str | None = None
    greeted: bool = False
    exit: Exit | None = None  # it is gone, and its last words are still being read
    deaf: bool = False  # it was killed because it did not read


@dataclass(slots=True)
class Member:
    planned: PlannedRank
    rank: Rank
    since: float  # when it came into its state
    life: Life | None = None
    timers: dict[Timer, asyncio.TimerHandle] = field(default_factory=dict)
    log_tail: Sequence[str] = ()  # of the incarnation that failed

    @classmethod
    def of(cls, planned: PlannedRank, now: float) -> Member:
        return cls(planned=planned, rank=initial(planned.rank), since=now)

    @property
    def name(self) -> RankName:
        return self.planned.rank

    @property
    def gang(self) -> str | None:
        return self.planned.config.gang

    @property
    def pid(self) -> int | None:
        """Of its process; None when there is none, or no longer one."""
        life = self.life
        return life.handle.pid if life is not None and life.handle is not None and life.exit is None else None

    @property
    def stream(self) -> RankStream | None:
        return self.life.stream if self.life is not None else None
