"""Ranks that share a collective, and so start and die together: a small table over the states of its members. Pure."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from epdctl.ids import RankName
from epdctl.supervisor.states.events import PeerLost
from epdctl.supervisor.states.rank import ALIVE, ROUTABLE
from epdctl.wire.control import RankState

__all__ = ["Changed", "Faulted", "Gang", "GangEvent", "GangState", "Tell", "may_start", "step"]

States = Mapping[RankName, RankState]


class GangState(enum.Enum):
    IDLE = "idle"  # no member has a process
    FORMING = "forming"  # started together, not all ready yet
    RUNNING = "running"
    BREAKING = "breaking"  # one is lost; until all are down, none starts


@dataclass(frozen=True, slots=True)
class Gang:
    name: str
    members: tuple[RankName, ...]
    state: GangState = GangState.IDLE


@dataclass(frozen=True, slots=True)
class Changed:
    """The states of the members after some of them moved (all DependenciesReady of one start are one move)."""

    states: States


@dataclass(frozen=True, slots=True)
class Faulted:
    """A member's TellGang, with the states after it."""

    member: RankName
    reason: str
    states: States


@dataclass(frozen=True, slots=True)
class Tell:
    """Deliver ``event`` to ``member``."""

    member: RankName
    event: PeerLost


GangEvent = Changed | Faulted
Outcome = tuple[Gang, list[Tell]]
Handler = Callable[[Gang, Any], Outcome]

# A member in one of these, while others have a process, can no longer be met by them. WAITING breaks only a gang that
# had been complete: while it forms, a member may be about to start.
_LOST: Mapping[GangState, frozenset[RankState]] = {
    GangState.FORMING: frozenset({RankState.STOPPED, RankState.STOPPING, RankState.BACKOFF, RankState.FAILED}),
    GangState.RUNNING: frozenset({RankState.STOPPED, RankState.WAITING, RankState.BACKOFF, RankState.FAILED}),
}

# Those that go on working. Members that are all on their way out, by a stop or restart of the whole gang, may drain.
_STAYING = frozenset({RankState.STARTING, RankState.READY, RankState.UNHEALTHY})


def may_start(gang: Gang, states: States) -> bool:
    """DependenciesReady goes to every member at once, or to none."""
    return gang.state is GangState.IDLE and all(states[member] is RankState.WAITING for member in gang.members)


def step(gang: Gang, event: GangEvent) -> Outcome:
    """The gang after ``event``, and which members have to hear of it."""
    if type(event) in IGNORED[gang.state]:
        return gang, []
    return TRANSITIONS[gang.state][type(event)](gang, event)


def _alive(gang: Gang, states: States) -> list[RankName]:
    return [member for member in gang.members if states[member] in ALIVE]


def _begin(gang: Gang, event: Changed) -> Outcome:
    return _follow(replace(gang, state=GangState.FORMING), event)  # a member's start may have failed already


def _follow(gang: Gang, event: Changed) -> Outcome:
    if not _alive(gang, event.states):
        return replace(gang, state=GangState.IDLE), []
    lost = [member for member in gang.members if event.states[member] in _LOST[gang.state]]
    if lost and any(event.states[member] in _STAYING for member in gang.members):
        return _break(gang, Faulted(lost[0], f"it is {event.states[lost[0]]}", event.states))
    complete = all(event.states[member] in ROUTABLE for member in gang.members)
    return (replace(gang, state=GangState.RUNNING), []) if complete else (gang, [])


def _break(gang: Gang, event: Faulted) -> Outcome:
    """Everyone else is told; the one that faulted is on its way down already."""
    if not _alive(gang, event.states):
        return replace(gang, state=GangState.IDLE), []
    lost = PeerLost(f"{event.member} of its gang was lost: {event.reason}")
    others = [member for member in _alive(gang, event.states) if member != event.member]
    return replace(gang, state=GangState.BREAKING), [Tell(member, lost) for member in others]


def _clear(gang: Gang, event: Changed) -> Outcome:
    return (gang, []) if _alive(gang, event.states) else (replace(gang, state=GangState.IDLE), [])


TRANSITIONS: Mapping[GangState, Mapping[type[GangEvent], Handler]] = {
    GangState.IDLE: {Changed: _begin, Faulted: _break},
    GangState.FORMING: {Changed: _follow, Faulted: _break},
    GangState.RUNNING: {Changed: _follow, Faulted: _break},
    GangState.BREAKING: {Changed: _clear},
}

IGNORED: Mapping[GangState, frozenset[type[GangEvent]]] = {
    GangState.IDLE: frozenset(),
    GangState.FORMING: frozenset(),
    GangState.RUNNING: frozenset(),
    GangState.BREAKING: frozenset({Faulted}),  # everyone was told already
}
