"""From nothing to a process: waiting, spawning, and starting anew what has none."""

from __future__ import annotations

from dataclasses import replace

from epdctl.ids import Incarnation
from epdctl.supervisor.states.actions import Arm, Spawn
from epdctl.supervisor.states.events import (
    DependenciesReady,
    Event,
    Exited,
    RestartRequested,
    SpawnFailed,
    StartRequested,
    Timer,
    TimerFired,
)
from epdctl.supervisor.states.faults import exited_stopping, fault
from epdctl.supervisor.states.moves import Outcome, move, wait
from epdctl.supervisor.states.rank import Rank, Rules, recalling
from epdctl.wire.control import RankState

__all__ = [
    "backed_off",
    "forgive",
    "restart_backing_off",
    "restart_idle",
    "spawn",
    "spawn_failed",
    "spawn_failed_stopping",
]


def restart_idle(rank: Rank, event: StartRequested | RestartRequested, now: float, rules: Rules) -> Outcome:
    """From STOPPED or FAILED: one more process, with a budget as on the first day."""
    return wait(replace(rank, faults=(), cause="restart asked for" if rank.incarnation else ""), rules)


def restart_backing_off(rank: Rank, event: RestartRequested, now: float, rules: Rules) -> Outcome:
    return wait(replace(rank, faults=(), restarts=rank.restarts + 1), rules)


def backed_off(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return wait(replace(rank, restarts=rank.restarts + 1), rules)


def forgive(rank: Rank, event: Event, now: float, rules: Rules) -> Outcome:
    return replace(rank, faults=()), []


def spawn(rank: Rank, event: DependenciesReady, now: float, rules: Rules) -> Outcome:
    number = Incarnation(rank.incarnation + 1)
    fresh = replace(rank, incarnation=number, fatal=None, killed=False)
    timer = Arm(Timer.START, rules.deadlines.start)
    return move(fresh, RankState.STARTING, recalling(rank, "starting"), Spawn(number), timer)


def spawn_failed(rank: Rank, event: SpawnFailed, now: float, rules: Rules) -> Outcome:
    return fault(rank, f"could not be started: {event.error}", now, rules)


def spawn_failed_stopping(rank: Rank, event: SpawnFailed, now: float, rules: Rules) -> Outcome:
    """A stop overtook the news: no Exited will come, so this is the end of it."""
    return exited_stopping(rank, Exited(rank.incarnation, 0, reason_text=event.error), now, rules)
