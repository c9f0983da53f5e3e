"""Ending, or beginning anew, because somebody asked for it: drain, SIGTERM, and SIGKILL for who ignores that."""

from __future__ import annotations

import signal
from dataclasses import replace

from epdctl.supervisor.states.actions import Action, Arm, Signal
from epdctl.supervisor.states.events import (
    DrainedReported,
    RestartRequested,
    StartRequested,
    StopRequested,
    Timer,
    TimerFired,
)
from epdctl.supervisor.states.moves import Outcome, drain, end, move
from epdctl.supervisor.states.rank import Rank, Rules
from epdctl.wire.control import RankState

__all__ = [
    "drain_overdue",
    "drained",
    "kill",
    "restart_ending",
    "restart_serving",
    "restart_starting",
    "stop_draining",
    "stop_idle",
    "stop_serving",
    "stop_starting",
    "stop_stopping",
]

_STOP, _RESTART = "stop asked for", "restart asked for"


def stop_idle(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    reason = f"{_STOP}; it had failed: {rank.reason}" if rank.state is RankState.FAILED else _STOP
    return move(replace(rank, wanted=False), RankState.STOPPED, reason)


def stop_starting(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    """Nothing is in flight yet, so there is nothing to drain."""
    number = signal.SIGKILL if event.force else signal.SIGTERM
    return end(replace(rank, wanted=False), _STOP, number, rules)


def stop_serving(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    rank = replace(rank, wanted=False)
    return end(rank, _STOP, signal.SIGKILL, rules) if event.force else drain(rank, _STOP, rules)


def stop_draining(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    rank = replace(rank, wanted=False)
    return end(rank, _STOP, signal.SIGKILL, rules) if event.force else (replace(rank, reason=_STOP), [])


def stop_stopping(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    rank = replace(rank, wanted=False, faulted=False, killed=rank.killed or event.force)
    return rank, _killing(rules) if event.force else []


def restart_starting(rank: Rank, event: RestartRequested, now: float, rules: Rules) -> Outcome:
    return end(replace(rank, faults=()), _RESTART, signal.SIGTERM, rules)


def restart_serving(rank: Rank, event: RestartRequested, now: float, rules: Rules) -> Outcome:
    return drain(replace(rank, faults=()), _RESTART, rules)


def restart_ending(rank: Rank, event: StartRequested | RestartRequested, now: float, rules: Rules) -> Outcome:
    return replace(rank, wanted=True, faulted=False, faults=(), reason=_RESTART), []


def drained(rank: Rank, event: DrainedReported, now: float, rules: Rules) -> Outcome:
    return end(rank, rank.reason, signal.SIGTERM, rules)


def drain_overdue(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    reason = f"{rank.reason}; not drained within {rules.deadlines.drain:g} s, so what it had is cut off"
    return end(rank, reason, signal.SIGTERM, rules)


def kill(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    """Said again for as long as the process is there: a stuck driver may hold it beyond the first SIGKILL."""
    reason = rank.reason
    if not rank.killed and rank.fatal is None:
        reason = f"{reason}; ignored SIGTERM for {rules.deadlines.kill:g} s and was killed"
    return replace(rank, killed=True, reason=reason), _killing(rules)


def _killing(rules: Rules) -> list[Action]:
    return [Signal(signal.SIGKILL), Arm(Timer.KILL, rules.deadlines.kill)]
