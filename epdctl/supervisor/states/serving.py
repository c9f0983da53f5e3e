"""A process at work: ready, its heartbeats, and their absence."""

from __future__ import annotations

from dataclasses import replace

from epdctl.supervisor.states.actions import Arm
from epdctl.supervisor.states.events import HeartbeatSeen, ReadyReported, Timer, TimerFired
from epdctl.supervisor.states.faults import overdue
from epdctl.supervisor.states.moves import Outcome, move
from epdctl.supervisor.states.rank import Rank, Rules, recalling
from epdctl.wire.control import RankState

__all__ = ["beat_draining", "beat_ready", "beat_unhealthy", "ready", "silent"]


def ready(rank: Rank, event: ReadyReported | HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    stable = Arm(Timer.STABLE, rules.restart.stable)
    return move(rank, RankState.READY, recalling(rank, "ready"), *_beats(rules), stable)


def beat_ready(rank: Rank, event: HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    if event.standstill >= rules.deadlines.stuck:
        return _stuck(rank, event, rules)
    if event.unhealthy is None:
        return rank, list(_beats(rules))
    return move(rank, RankState.UNHEALTHY, event.unhealthy, Arm(Timer.DEAD, rules.deadlines.dead), _recovery(rules))


def beat_unhealthy(rank: Rank, event: HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    if event.standstill >= rules.deadlines.stuck:
        return _stuck(rank, event, rules)
    if event.unhealthy is None:
        return ready(rank, event, now, rules)
    return replace(rank, reason=event.unhealthy), [Arm(Timer.DEAD, rules.deadlines.dead)]


def beat_draining(rank: Rank, event: HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    return rank, [Arm(Timer.DEAD, rules.deadlines.dead)]


def silent(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    reason = f"no heartbeat for {rules.deadlines.unhealthy:g} s"
    return move(rank, RankState.UNHEALTHY, reason, _recovery(rules))


def _beats(rules: Rules) -> tuple[Arm, Arm]:
    return Arm(Timer.HEARTBEAT, rules.deadlines.unhealthy), Arm(Timer.DEAD, rules.deadlines.dead)


def _recovery(rules: Rules) -> Arm:
    """Not prolonged by heartbeats: whoever is unhealthy for so long does not get well by itself."""
    return Arm(Timer.SICK, rules.deadlines.stuck)


def _stuck(rank: Rank, event: HeartbeatSeen, rules: Rules) -> Outcome:
    """It beats, so its loop lives; its work does not."""
    seconds = round(event.standstill, 1)
    why = f"its work has stood still for {seconds:g} s (raise deadlines.stuck where one step may take that long)"
    return overdue(rank, why, rules)
