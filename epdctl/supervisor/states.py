"""The life of one rank as a table: (state, event) in, (state, actions) out. No I/O, no clock.

A process exists iff the state is in ALIVE; a rank is advertised iff its state is in LINKED, for new work iff it is
in ROUTABLE. What follows from the states alone (Withdraw, Advertise, disarming) is derived in ``_move``, so that no
handler can forget it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from epdctl.ids import Incarnation
from epdctl.supervisor.backoff import delay
from epdctl.supervisor.events import (
    Action,
    Advertise,
    Arm,
    DependenciesReady,
    Disarm,
    DisarmAll,
    DrainedReported,
    Event,
    Exited,
    FatalReported,
    HeartbeatSeen,
    PeerLost,
    ReadyReported,
    RestartRequested,
    SendDrain,
    Signal,
    Spawn,
    SpawnFailed,
    StartRequested,
    StopRequested,
    TellGang,
    Timer,
    TimerFired,
    Withdraw,
)
from epdctl.supervisor.rank import (
    ALIVE,
    LINKED,
    ROUTABLE,
    SETTLED,
    IllegalTransition,
    LastWords,
    Rank,
    Rules,
    check,
    ending,
    initial,
    recalling,
)
from epdctl.topology.plan import RestartMode
from epdctl.wire.control import RankState

__all__ = [
    "ALIVE",
    "IGNORED",
    "LINKED",
    "ROUTABLE",
    "SETTLED",
    "TIMERS",
    "TRANSITIONS",
    "Action",
    "Advertise",
    "Arm",
    "DependenciesReady",
    "Disarm",
    "DisarmAll",
    "DrainedReported",
    "Event",
    "Exited",
    "FatalReported",
    "Handler",
    "HeartbeatSeen",
    "IllegalTransition",
    "LastWords",
    "PeerLost",
    "Rank",
    "ReadyReported",
    "RestartRequested",
    "Rules",
    "SendDrain",
    "Signal",
    "Spawn",
    "SpawnFailed",
    "StartRequested",
    "StopRequested",
    "TellGang",
    "Timer",
    "TimerFired",
    "Withdraw",
    "check",
    "initial",
    "step",
]

STOPPED, WAITING, STARTING = RankState.STOPPED, RankState.WAITING, RankState.STARTING
READY, UNHEALTHY, DRAINING = RankState.READY, RankState.UNHEALTHY, RankState.DRAINING
STOPPING, BACKOFF, FAILED = RankState.STOPPING, RankState.BACKOFF, RankState.FAILED

HISTORY = 16

Outcome = tuple[Rank, list[Action]]
Handler = Callable[[Rank, Any, float, Rules], Outcome]


def step(rank: Rank, event: Event, now: float, rules: Rules) -> Outcome:
    """The rank after ``event`` and what to do about it. Raises IllegalTransition, and then nothing has changed."""
    if _is_stale(rank, event):
        return rank, []
    handler = TRANSITIONS[rank.state].get(type(event))
    if handler is not None:
        return handler(rank, event, now, rules)
    if type(event) in IGNORED[rank.state]:
        return rank, []
    raise IllegalTransition(rank, event)


def _is_stale(rank: Rank, event: Event) -> bool:
    """The one fence: another incarnation's event, or a timer that had fired before it was disarmed."""
    if getattr(event, "incarnation", rank.incarnation) != rank.incarnation:
        return True
    return isinstance(event, TimerFired) and (rank.state, event.timer) not in TIMERS


def _move(rank: Rank, to: RankState, reason: str, *actions: Action) -> Outcome:
    left = rank.state
    moved = replace(rank, state=to, reason=reason, history=(*rank.history, (to, reason))[-HISTORY:])
    before: list[Action] = [Withdraw()] if left in LINKED and to not in LINKED else []
    after: list[Action] = [Advertise()] if to in LINKED and to is not left else []
    return moved, [*before, *_disarm(left, to), *actions, *after]


def _disarm(left: RankState, to: RankState) -> list[Action]:
    """Only the timers that the new state keeps may go on running."""
    if to not in ALIVE:
        return [DisarmAll()] if _keeps(left) else []
    return [Disarm(timer) for timer in Timer if timer in _keeps(left) - _keeps(to)]


def _keeps(state: RankState) -> frozenset[Timer]:
    return frozenset(timer for owner, timer in TIMERS if owner is state)


# --- starting --------------------------------------------------------------------------------------------------------


def _wait(rank: Rank, rules: Rules) -> Outcome:
    goal = rules.waits_for or ("its gang" if rules.gang else "its turn to start")
    return _move(replace(rank, wanted=True), WAITING, recalling(rank, f"waiting for {goal}"))


def _restart_idle(rank: Rank, event: StartRequested | RestartRequested, now: float, rules: Rules) -> Outcome:
    """From STOPPED or FAILED: one more process, with a budget as on the first day."""
    return _wait(replace(rank, faults=(), cause="restart asked for" if rank.incarnation else ""), rules)


def _restart_backing_off(rank: Rank, event: RestartRequested, now: float, rules: Rules) -> Outcome:
    return _wait(replace(rank, faults=()), rules)


def _forgive(rank: Rank, event: Event, now: float, rules: Rules) -> Outcome:
    return replace(rank, faults=()), []


def _spawn(rank: Rank, event: DependenciesReady, now: float, rules: Rules) -> Outcome:
    number = Incarnation(rank.incarnation + 1)
    fresh = replace(rank, incarnation=number, fatal=None, killed=False)
    timer = Arm(Timer.START, rules.deadlines.start)
    return _move(fresh, STARTING, recalling(rank, "starting"), Spawn(number), timer)


def _spawn_failed(rank: Rank, event: SpawnFailed, now: float, rules: Rules) -> Outcome:
    return _fault(rank, f"could not be started: {event.error}", now, rules)


def _spawn_failed_stopping(rank: Rank, event: SpawnFailed, now: float, rules: Rules) -> Outcome:
    """A stop overtook the news: no Exited will come, so this is the end of it."""
    return _exited_stopping(rank, Exited(rank.incarnation, 0, reason_text=event.error), now, rules)


# --- serving ---------------------------------------------------------------------------------------------------------


def _ready(rank: Rank, event: ReadyReported | HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    return _move(rank, READY, recalling(rank, "ready"), *_beats(rules), Arm(Timer.STABLE, rules.restart.stable))


def _beats(rules: Rules) -> tuple[Arm, Arm]:
    return Arm(Timer.HEARTBEAT, rules.deadlines.unhealthy), Arm(Timer.DEAD, rules.deadlines.dead)


def _beat_ready(rank: Rank, event: HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    if event.standstill >= rules.deadlines.stuck:
        return _stuck(rank, event, rules)
    if event.unhealthy is None:
        return rank, list(_beats(rules))
    return _move(rank, UNHEALTHY, event.unhealthy, Arm(Timer.DEAD, rules.deadlines.dead), _recovery(rules))


def _recovery(rules: Rules) -> Arm:
    """Not prolonged by heartbeats: whoever is unhealthy for so long does not get well by itself."""
    return Arm(Timer.SICK, rules.deadlines.stuck)


def _stuck(rank: Rank, event: HeartbeatSeen, rules: Rules) -> Outcome:
    """It beats, so its loop lives; its work does not."""
    return _overdue(rank, f"its work has stood still for {event.standstill:.3g} s", rules)


def _beat_unhealthy(rank: Rank, event: HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    if event.standstill >= rules.deadlines.stuck:
        return _stuck(rank, event, rules)
    if event.unhealthy is None:
        return _ready(rank, event, now, rules)
    return replace(rank, reason=event.unhealthy), [Arm(Timer.DEAD, rules.deadlines.dead)]


def _beat_draining(rank: Rank, event: HeartbeatSeen, now: float, rules: Rules) -> Outcome:
    return rank, [Arm(Timer.DEAD, rules.deadlines.dead)]


def _silent(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return _move(rank, UNHEALTHY, f"no heartbeat for {rules.deadlines.unhealthy:g} s", _recovery(rules))


# --- ending: by request ----------------------------------------------------------------------------------------------


def _stop_idle(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    reason = f"stop asked for; it had failed: {rank.reason}" if rank.state is FAILED else "stop asked for"
    return _move(replace(rank, wanted=False), STOPPED, reason)


def _stop_starting(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    """Nothing is in flight yet, so there is nothing to drain."""
    return _end(replace(rank, wanted=False), "stop asked for", _last_signal(event), rules)


def _stop_serving(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    rank = replace(rank, wanted=False)
    if event.force:
        return _end(rank, "stop asked for", signal.SIGKILL, rules)
    return _drain(rank, "stop asked for", rules)


def _stop_draining(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    rank = replace(rank, wanted=False)
    if event.force:
        return _end(rank, "stop asked for", signal.SIGKILL, rules)
    return replace(rank, reason="stop asked for"), []


def _stop_stopping(rank: Rank, event: StopRequested, now: float, rules: Rules) -> Outcome:
    rank = replace(rank, wanted=False, faulted=False, killed=rank.killed or event.force)
    if event.force:
        return rank, [Signal(signal.SIGKILL), Arm(Timer.KILL, rules.deadlines.kill)]
    return rank, []


def _restart_starting(rank: Rank, event: RestartRequested, now: float, rules: Rules) -> Outcome:
    return _end(replace(rank, faults=()), "restart asked for", signal.SIGTERM, rules)


def _restart_serving(rank: Rank, event: RestartRequested, now: float, rules: Rules) -> Outcome:
    return _drain(replace(rank, faults=()), "restart asked for", rules)


def _restart_ending(rank: Rank, event: StartRequested | RestartRequested, now: float, rules: Rules) -> Outcome:
    return replace(rank, wanted=True, faulted=False, faults=(), reason="restart asked for"), []


def _last_signal(event: StopRequested) -> signal.Signals:
    return signal.SIGKILL if event.force else signal.SIGTERM


def _drain(rank: Rank, reason: str, rules: Rules) -> Outcome:
    seconds = rules.deadlines.drain
    return _move(rank, DRAINING, reason, SendDrain(seconds), Arm(Timer.DRAIN, seconds))


def _drained(rank: Rank, event: DrainedReported | TimerFired, now: float, rules: Rules) -> Outcome:
    return _end(rank, rank.reason, signal.SIGTERM, rules)


def _end(rank: Rank, reason: str, number: signal.Signals, rules: Rules) -> Outcome:
    rank = replace(rank, killed=number is signal.SIGKILL)
    return _move(rank, STOPPING, reason, Signal(number), Arm(Timer.KILL, rules.deadlines.kill))


def _kill(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    """Said again for as long as the process is there: a stuck driver may hold it beyond the first SIGKILL."""
    reason = rank.reason
    if not rank.killed and rank.fatal is None:
        reason = f"{reason}; ignored SIGTERM for {rules.deadlines.kill:g} s and was killed"
    actions: list[Action] = [Signal(signal.SIGKILL), Arm(Timer.KILL, rules.deadlines.kill)]
    return replace(rank, killed=True, reason=reason), actions


# --- ending: by a fault ----------------------------------------------------------------------------------------------


def _told(rules: Rules, reason: str) -> list[Action]:
    return [TellGang(reason)] if rules.gang else []


def _overdue(rank: Rank, reason: str, rules: Rules) -> Outcome:
    ended, actions = _end(replace(rank, faulted=True), reason, signal.SIGKILL, rules)
    return ended, [*actions, *_told(rules, reason)]


def _start_overdue(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return _overdue(rank, f"not ready within {rules.deadlines.start:g} s", rules)


def _dead(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return _overdue(rank, f"no heartbeat for {rules.deadlines.dead:g} s", rules)


def _sick(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return _overdue(rank, f"{rank.reason}; it was unhealthy for {rules.deadlines.stuck:g} s", rules)


def _dead_draining(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    reason = f"{rank.reason}; no heartbeat for {rules.deadlines.dead:g} s while draining"
    return _end(rank, reason, signal.SIGKILL, rules)


def _peer_lost(rank: Rank, event: PeerLost, now: float, rules: Rules) -> Outcome:
    return _end(replace(rank, faulted=True), event.reason, signal.SIGKILL, rules)


def _fatal(rank: Rank, event: FatalReported, now: float, rules: Rules) -> Outcome:
    """It leaves by itself; the KILL timer sees to it that it really does."""
    doomed = replace(rank, fatal=LastWords(event.text, event.restartable), faulted=True)
    moved, actions = _move(doomed, STOPPING, event.text, Arm(Timer.KILL, rules.deadlines.kill))
    return moved, [*actions, *_told(rules, event.text)]


def _fatal_stopping(rank: Rank, event: FatalReported, now: float, rules: Rules) -> Outcome:
    return replace(rank, fatal=LastWords(event.text, event.restartable)), []


def _exited(rank: Rank, event: Exited, now: float, rules: Rules) -> Outcome:
    return _fault(rank, ending(rank, event), now, rules, clean=event.code == 0 and event.by == "rank")


def _exited_draining(rank: Rank, event: Exited, now: float, rules: Rules) -> Outcome:
    if rank.wanted and (event.code != 0 or event.by != "rank"):
        return _exited(rank, event, now, rules)
    return _exited_stopping(rank, event, now, rules)


def _exited_stopping(rank: Rank, event: Exited, now: float, rules: Rules) -> Outcome:
    if not rank.wanted:
        return _move(replace(rank, faulted=False), STOPPED, rank.reason)
    if rank.faulted:
        return _settle(rank, ending(rank, event) if rank.fatal else rank.reason, now, rules)
    return _wait(replace(rank, cause=rank.reason), rules)


def _fault(rank: Rank, why: str, now: float, rules: Rules, clean: bool = False) -> Outcome:
    """A process that ended without being asked. (Those that we ended have told their gang before.)"""
    settled, actions = _settle(rank, why, now, rules, clean)
    return settled, [*actions, *_told(rules, why)]


def _settle(rank: Rank, why: str, now: float, rules: Rules, clean: bool = False) -> Outcome:
    """After a fault, with the process gone: try again later, or give up and say why."""
    policy = rules.restart
    recent = tuple(at for at in rank.faults if now - at < policy.window)
    rank = replace(rank, faulted=False, faults=recent, cause=why)
    if clean and policy.mode is RestartMode.ON_FAILURE:
        return _move(replace(rank, wanted=False), STOPPED, why)
    if policy.mode is RestartMode.NEVER or (rank.fatal and not rank.fatal.restartable):
        return _move(rank, FAILED, why)
    if len(recent) >= policy.budget:
        return _move(rank, FAILED, f"{why}; gave up after {len(recent)} restarts in {policy.window:g} s")
    rank = replace(rank, faults=(*recent, now))
    return _move(rank, BACKOFF, why, Arm(Timer.BACKOFF, delay(policy, len(rank.faults), rules.jitter)))


def _backed_off(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return _wait(rank, rules)


def _fatal_late(rank: Rank, event: FatalReported, now: float, rules: Rules) -> Outcome:
    """Last words that arrived after the end: they may still say that a restart is pointless."""
    why = f"{rank.cause}: {event.text}"
    rank = replace(rank, fatal=LastWords(event.text, event.restartable), cause=why)
    return (replace(rank, reason=why), []) if event.restartable else _move(rank, FAILED, why)


# --- the table -------------------------------------------------------------------------------------------------------


def _on_timer(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return TIMERS[rank.state, event.timer](rank, event, now, rules)


TIMERS: Mapping[tuple[RankState, Timer], Handler] = {
    (STARTING, Timer.START): _start_overdue,
    (READY, Timer.HEARTBEAT): _silent,
    (READY, Timer.DEAD): _dead,
    (READY, Timer.STABLE): _forgive,
    (UNHEALTHY, Timer.DEAD): _dead,
    (UNHEALTHY, Timer.SICK): _sick,
    (DRAINING, Timer.DRAIN): _drained,
    (DRAINING, Timer.DEAD): _dead_draining,
    (STOPPING, Timer.KILL): _kill,
    (BACKOFF, Timer.BACKOFF): _backed_off,
}

TRANSITIONS: Mapping[RankState, Mapping[type[Event], Handler]] = {
    STOPPED: {
        StartRequested: _restart_idle,
        RestartRequested: _restart_idle,
    },
    WAITING: {
        StopRequested: _stop_idle,
        RestartRequested: _forgive,
        DependenciesReady: _spawn,
    },
    STARTING: {
        StopRequested: _stop_starting,
        RestartRequested: _restart_starting,
        PeerLost: _peer_lost,
        SpawnFailed: _spawn_failed,
        ReadyReported: _ready,
        FatalReported: _fatal,
        Exited: _exited,
        TimerFired: _on_timer,
    },
    READY: {
        StopRequested: _stop_serving,
        RestartRequested: _restart_serving,
        PeerLost: _peer_lost,
        HeartbeatSeen: _beat_ready,
        FatalReported: _fatal,
        Exited: _exited,
        TimerFired: _on_timer,
    },
    UNHEALTHY: {
        StopRequested: _stop_serving,
        RestartRequested: _restart_serving,
        PeerLost: _peer_lost,
        HeartbeatSeen: _beat_unhealthy,
        FatalReported: _fatal,
        Exited: _exited,
        TimerFired: _on_timer,
    },
    DRAINING: {
        StartRequested: _restart_ending,
        StopRequested: _stop_draining,
        RestartRequested: _restart_ending,
        PeerLost: _peer_lost,
        HeartbeatSeen: _beat_draining,
        FatalReported: _fatal,
        DrainedReported: _drained,
        Exited: _exited_draining,
        TimerFired: _on_timer,
    },
    STOPPING: {
        StartRequested: _restart_ending,
        StopRequested: _stop_stopping,
        RestartRequested: _restart_ending,
        SpawnFailed: _spawn_failed_stopping,
        FatalReported: _fatal_stopping,
        Exited: _exited_stopping,
        TimerFired: _on_timer,
    },
    BACKOFF: {
        StopRequested: _stop_idle,
        RestartRequested: _restart_backing_off,
        FatalReported: _fatal_late,
        TimerFired: _on_timer,
    },
    FAILED: {
        StartRequested: _restart_idle,
        StopRequested: _stop_idle,
        RestartRequested: _restart_idle,
    },
}

# What the process said before it ended may be read after its end.
_LATE = frozenset({ReadyReported, HeartbeatSeen, DrainedReported})

IGNORED: Mapping[RankState, frozenset[type[Event]]] = {
    STOPPED: _LATE | {FatalReported, StopRequested, DependenciesReady, PeerLost},
    WAITING: _LATE | {FatalReported, StartRequested, PeerLost},
    STARTING: frozenset({StartRequested, DependenciesReady, HeartbeatSeen}),  # START governs, not the heartbeats
    READY: frozenset({StartRequested}),
    UNHEALTHY: frozenset({StartRequested}),
    DRAINING: frozenset(),
    STOPPING: _LATE | {PeerLost},
    BACKOFF: _LATE | {StartRequested, PeerLost},
    FAILED: _LATE | {FatalReported, PeerLost},
}
