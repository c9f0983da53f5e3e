"""What happens in which state, as tables: (rank, event) in, (rank, actions) out. No I/O, no clock.

A process exists iff the state is in ALIVE; a rank is advertised iff its state is in LINKED, for new work iff it is
in ROUTABLE. What follows from the two states alone (Withdraw, Advertise, disarming) is derived in ``step``, so that no
handler can forget it.
"""

from __future__ import annotations

from collections.abc import Mapping

from epdctl.supervisor.states import asked, faults, serving, starting
from epdctl.supervisor.states.actions import Action, Advertise, Disarm, DisarmAll, Withdraw
from epdctl.supervisor.states.events import (
    DependenciesReady,
    DrainedReported,
    Event,
    Exited,
    FatalReported,
    HeartbeatSeen,
    PeerLost,
    ReadyReported,
    RestartRequested,
    SpawnFailed,
    StartRequested,
    StopRequested,
    Timer,
    TimerFired,
)
from epdctl.supervisor.states.moves import Handler, Outcome
from epdctl.supervisor.states.rank import ALIVE, LINKED, IllegalTransition, Rank, Rules
from epdctl.wire.control import RankState

__all__ = ["IGNORED", "TIMERS", "TRANSITIONS", "step"]

STOPPED, WAITING, STARTING = RankState.STOPPED, RankState.WAITING, RankState.STARTING
READY, UNHEALTHY, DRAINING = RankState.READY, RankState.UNHEALTHY, RankState.DRAINING
STOPPING, BACKOFF, FAILED = RankState.STOPPING, RankState.BACKOFF, RankState.FAILED


def step(rank: Rank, event: Event, now: float, rules: Rules) -> Outcome:
    """The rank after ``event`` and what to do about it. Raises IllegalTransition, and then nothing has changed."""
    if _is_stale(rank, event):
        return rank, []
    handler = TRANSITIONS[rank.state].get(type(event))
    if handler is not None:
        after, actions = handler(rank, event, now, rules)
        return after, _with_what_follows(rank.state, after.state, actions)
    if type(event) in IGNORED[rank.state]:
        return rank, []
    raise IllegalTransition(rank, event)


def _is_stale(rank: Rank, event: Event) -> bool:
    """The one fence: another incarnation's event, or a timer that had fired before it was disarmed."""
    if getattr(event, "incarnation", rank.incarnation) != rank.incarnation:
        return True
    return isinstance(event, TimerFired) and (rank.state, event.timer) not in TIMERS


def _with_what_follows(left: RankState, to: RankState, actions: list[Action]) -> list[Action]:
    if to is left:
        return actions
    before: list[Action] = [Withdraw()] if left in LINKED and to not in LINKED else []
    after: list[Action] = [Advertise()] if to in LINKED else []
    return [*before, *_disarm(left, to), *actions, *after]


def _disarm(left: RankState, to: RankState) -> list[Action]:
    """Only the timers that the new state keeps may go on running."""
    if to not in ALIVE:
        return [DisarmAll()] if _keeps(left) else []
    return [Disarm(timer) for timer in Timer if timer in _keeps(left) - _keeps(to)]


def _keeps(state: RankState) -> frozenset[Timer]:
    return frozenset(timer for owner, timer in TIMERS if owner is state)


def _on_timer(rank: Rank, event: TimerFired, now: float, rules: Rules) -> Outcome:
    return TIMERS[rank.state, event.timer](rank, event, now, rules)


TIMERS: Mapping[tuple[RankState, Timer], Handler] = {
    (STARTING, Timer.START): faults.start_overdue,
    (READY, Timer.HEARTBEAT): serving.silent,
    (READY, Timer.DEAD): faults.dead,
    (READY, Timer.STABLE): starting.forgive,
    (UNHEALTHY, Timer.DEAD): faults.dead,
    (UNHEALTHY, Timer.SICK): faults.sick,
    (DRAINING, Timer.DRAIN): asked.drain_overdue,
    (DRAINING, Timer.DEAD): faults.dead_draining,
    (STOPPING, Timer.KILL): asked.kill,
    (BACKOFF, Timer.BACKOFF): starting.backed_off,
}

TRANSITIONS: Mapping[RankState, Mapping[type[Event], Handler]] = {
    STOPPED: {
        StartRequested: starting.restart_idle,
        RestartRequested: starting.restart_idle,
    },
    WAITING: {
        StopRequested: asked.stop_idle,
        RestartRequested: starting.forgive,
        DependenciesReady: starting.spawn,
    },
    STARTING: {
        StopRequested: asked.stop_starting,
        RestartRequested: asked.restart_starting,
        PeerLost: faults.peer_lost,
        SpawnFailed: starting.spawn_failed,
        ReadyReported: serving.ready,
        FatalReported: faults.fatal,
        Exited: faults.exited,
        TimerFired: _on_timer,
    },
    READY: {
        StopRequested: asked.stop_serving,
        RestartRequested: asked.restart_serving,
        PeerLost: faults.peer_lost,
        HeartbeatSeen: serving.beat_ready,
        FatalReported: faults.fatal,
        Exited: faults.exited,
        TimerFired: _on_timer,
    },
    UNHEALTHY: {
        StopRequested: asked.stop_serving,
        RestartRequested: asked.restart_serving,
        PeerLost: faults.peer_lost,
        HeartbeatSeen: serving.beat_unhealthy,
        FatalReported: faults.fatal,
        Exited: faults.exited,
        TimerFired: _on_timer,
    },
    DRAINING: {
        StartRequested: asked.restart_ending,
        StopRequested: asked.stop_draining,
        RestartRequested: asked.restart_ending,
        PeerLost: faults.peer_lost,
        HeartbeatSeen: serving.beat_draining,
        FatalReported: faults.fatal,
        DrainedReported: asked.drained,
        Exited: faults.exited_draining,
        TimerFired: _on_timer,
    },
    STOPPING: {
        StartRequested: asked.restart_ending,
        StopRequested: asked.stop_stopping,
        RestartRequested: asked.restart_ending,
        SpawnFailed: starting.spawn_failed_stopping,
        FatalReported: faults.fatal_stopping,
        Exited: faults.exited_stopping,
        TimerFired: _on_timer,
    },
    BACKOFF: {
        StopRequested: asked.stop_idle,
        RestartRequested: starting.restart_backing_off,
        FatalReported: faults.fatal_late,
        TimerFired: _on_timer,
    },
    FAILED: {
        StartRequested: starting.restart_idle,
        StopRequested: asked.stop_idle,
        RestartRequested: starting.restart_idle,
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
