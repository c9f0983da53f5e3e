"""One rank as a value: everything the supervisor decides about it from, and what must always hold."""

from __future__ import annotations

from dataclasses import dataclass

from epdctl.errors import EpdError
from epdctl.ids import Incarnation, RankName
from epdctl.supervisor.states.events import Event
from epdctl.topology.plan import Deadlines, RestartPolicy
from epdctl.wire.control import RankState

__all__ = [
    "ALIVE",
    "LINKED",
    "ROUTABLE",
    "SETTLED",
    "IllegalTransition",
    "LastWords",
    "Rank",
    "Rules",
    "check",
    "initial",
    "recalling",
]

ALIVE = frozenset({RankState.STARTING, RankState.READY, RankState.UNHEALTHY, RankState.DRAINING, RankState.STOPPING})
ROUTABLE = frozenset({RankState.READY})  # gets new work
LINKED = ROUTABLE | {RankState.DRAINING}  # finishes the work it has, so its peers keep their links to it
SETTLED = frozenset({RankState.STOPPED, RankState.FAILED})
_WANTED = frozenset({RankState.WAITING, RankState.STARTING, RankState.READY, RankState.UNHEALTHY, RankState.BACKOFF})


@dataclass(frozen=True, slots=True)
class LastWords:
    text: str
    restartable: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """What one step is decided by, besides rank and event."""

    restart: RestartPolicy
    deadlines: Deadlines
    jitter: float = 0.0  # drawn by the caller from [-1, 1]
    gang: bool = False


@dataclass(frozen=True, slots=True)
class Rank:
    """Everything the supervisor decides about one rank from."""

    name: RankName
    state: RankState
    reason: str
    wanted: bool = False
    faulted: bool = False  # this stop came from a fault, so it spends the budget
    killed: bool = False  # SIGKILL was sent to the present incarnation
    fatal: LastWords | None = None
    cause: str = ""  # why the incarnation before this one ended
    incarnation: Incarnation = Incarnation(0)  # noqa: RUF009
    restarts: int = 0  # that a fault made necessary
    faults: tuple[float, ...] = ()  # when the restarts within the window were decided
    history: tuple[tuple[RankState, str], ...] = ()

    @property
    def died(self) -> bool:
        """The present incarnation ended, or is ending, by a fault."""
        return self.faulted or self.state in (RankState.BACKOFF, RankState.FAILED)

    @property
    def restarts_asked(self) -> int:
        """All the others: somebody wanted them."""
        return max(0, self.incarnation - 1 - self.restarts)


class IllegalTransition(EpdError):
    """An event that cannot happen in this state: a mistake in whoever sent it. Nothing was changed."""

    def __init__(self, rank: Rank, event: Event) -> None:
        past = " → ".join(f"{state} ({reason})" for state, reason in rank.history)
        super().__init__(f"{rank.name} is {rank.state}, where {event} cannot happen; it was: {past or 'never started'}")
        self.rank = rank
        self.event = event


def initial(name: RankName) -> Rank:
    return Rank(name=name, state=RankState.STOPPED, reason="never started")


def check(rank: Rank) -> None:
    """Raises AssertionError when the rank is one that cannot be."""
    assert rank.state not in _WANTED or rank.wanted, f"{rank.name} is {rank.state} though nobody wants it"
    assert rank.state is not RankState.STOPPED or not rank.wanted, f"{rank.name} is stopped though it is wanted"
    assert not rank.faulted or rank.state is RankState.STOPPING, f"{rank.name} is {rank.state} with a fault still open"
    assert rank.state not in ALIVE or rank.incarnation > 0, f"{rank.name} is {rank.state} without a process"
    assert rank.reason, f"{rank.name} is {rank.state} without a reason"


def recalling(rank: Rank, text: str) -> str:
    """``text``, and why the incarnation before this one ended."""
    return f"{text}; last restart: {rank.cause}" if rank.cause else text
