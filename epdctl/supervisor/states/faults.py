"""Ending without being asked, or by a deadline that was missed; then one more try, or giving up."""

from __future__ import annotations

import signal
from dataclasses import replace

from epdctl.supervisor.backoff import delay
from epdctl.supervisor.states.actions import Action, Arm, TellGang
from epdctl.supervisor.states.endings import ending
from epdctl.supervisor.states.events import Exited, FatalReported, PeerLost, Timer, TimerFired
from epdctl.supervisor.states.moves import Outcome, end, move, wait
from epdctl.supervisor.states.rank import LastWords, Rank, Rules
from epdctl.topology.plan import RestartMode
from epdctl.wire.control import RankState

__all__ = [
    "dead",
    "dead_draining",
    "exited",
    "exited_draining",
    "exited_stopping",
    "fatal",
    "fatal_late",
    "fatal_stopping",
    "fault",
    "overdue",
    "peer_lost",
    "sick",
    "start_overdue",
]


# --- a process that has to go ----------------------------------------------------------------------------------------


def overdue(rank: Rank, reason: str, rules: Rules) -> Outcome:
    ended, actions = end(replace(rank, faulted=True), reason, signal.SIGKILL, rules)
    return ended, [*actions, *_told(rules, reason)]


def start_overdue(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return overdue(rank, f"not ready within {rules.deadlines.start:g} s (deadlines.start)", rules)


def dead(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return overdue(rank, f"no heartbeat for {rules.deadlines.dead:g} s", rules)


def sick(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return overdue(rank, f"{rank.reason}; it was unhealthy for {rules.deadlines.stuck:g} s (deadlines.stuck)", rules)


def dead_draining(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    reason = f"{rank.reason}; no heartbeat for {rules.deadlines.dead:g} s while draining"
    return end(rank, reason, signal.SIGKILL, rules)


def peer_lost(rank: Rank, event: PeerLost, now: float, rules: Rules) -> Outcome:
    return end(replace(rank, faulted=True), event.reason, signal.SIGKILL, rules)


def fatal(rank: Rank, event: FatalReported, now: float, rules: Rules) -> Outcome:
    """It leaves by itself; the KILL timer sees to it that it really does."""
    doomed = replace(rank, fatal=LastWords(event.text, event.restartable), faulted=True)
    moved, actions = move(doomed, RankState.STOPPING, event.text, Arm(Timer.KILL, rules.deadlines.kill))
    return moved, [*actions, *_told(rules, event.text)]


def fatal_stopping(rank: Rank, event: FatalReported, now: float, rules: Rules) -> Outcome:
    return replace(rank, fatal=LastWords(event.text, event.restartable)), []


def _told(rules: Rules, reason: str) -> list[Action]:
    return [TellGang(reason)] if rules.gang else []


# --- a process that is gone ------------------------------------------------------------------------------------------


def exited(rank: Rank, event: Exited, now: float, rules: Rules) -> Outcome:
    return fault(rank, ending(rank, event), now, rules, clean=event.code == 0 and event.by == "rank")


def exited_draining(rank: Rank, event: Exited, now: float, rules: Rules) -> Outcome:
    if rank.wanted and (event.code != 0 or event.by != "rank"):
        return exited(rank, event, now, rules)
    return exited_stopping(rank, event, now, rules)


def exited_stopping(rank: Rank, event: Exited, now: float, rules: Rules) -> Outcome:
    if not rank.wanted:
        return move(replace(rank, faulted=False), RankState.STOPPED, rank.reason)
    if rank.faulted:
        return _settle(rank, ending(rank, event) if rank.fatal else rank.reason, now, rules)
    return wait(replace(rank, cause=rank.reason), rules)


def fault(rank: Rank, why: str, now: float, rules: Rules, clean: bool = False) -> Outcome:
    """A process that ended without being asked. (Those that we ended have told their gang before.)"""
    settled, actions = _settle(rank, why, now, rules, clean)
    return settled, [*actions, *_told(rules, why)]


def _settle(rank: Rank, why: str, now: float, rules: Rules, clean: bool = False) -> Outcome:
    """After a fault, with the process gone: try again later, or give up and say why."""
    policy = rules.restart
    recent = tuple(at for at in rank.faults if now - at < policy.window)
    rank = replace(rank, faulted=False, faults=recent, cause=why)
    if clean and policy.mode is RestartMode.ON_FAILURE:
        return move(replace(rank, wanted=False), RankState.STOPPED, why)
    if policy.mode is RestartMode.NEVER or (rank.fatal and not rank.fatal.restartable):
        return move(rank, RankState.FAILED, why)
    if len(recent) >= policy.budget:
        why = f"{why}; gave up after {len(recent)} restarts in {policy.window:g} s"
        return move(rank, RankState.FAILED, why)
    rank = replace(rank, faults=(*recent, now))
    return move(rank, RankState.BACKOFF, why, Arm(Timer.BACKOFF, delay(policy, len(rank.faults), rules.jitter)))


def fatal_late(rank: Rank, event: FatalReported, now: float, rules: Rules) -> Outcome:
    """Last words that arrived after the end: they may still say that a restart is pointless."""
    why = f"{rank.cause}: {event.text}"
    rank = replace(rank, fatal=LastWords(event.text, event.restartable), cause=why)
    return (replace(rank, reason=why), []) if event.restartable else move(rank, RankState.FAILED, why)
