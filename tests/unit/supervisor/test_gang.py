"""Gangs, with a scripted one of two members: the table alone, then both members walked through their machines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from epdctl.ids import Incarnation, RankName
from epdctl.supervisor import gang as gangs
from epdctl.supervisor.gang import Changed, Faulted, Gang, GangState, Tell
from epdctl.supervisor.states.actions import Spawn, TellGang
from epdctl.supervisor.states.events import (
    DependenciesReady,
    DrainedReported,
    Event,
    Exited,
    FatalReported,
    PeerLost,
    ReadyReported,
    RestartRequested,
    SpawnFailed,
    StartRequested,
    StopRequested,
    Timer,
    TimerFired,
)
from epdctl.supervisor.states.rank import ALIVE, Rank, Rules, check, initial
from epdctl.supervisor.states.table import step
from epdctl.topology.plan import Deadlines, RestartPolicy
from epdctl.wire.control import RankState

A, B = RankName("prefill/0.0"), RankName("prefill/0.1")
WAITING, STARTING, READY = RankState.WAITING, RankState.STARTING, RankState.READY
RULES = Rules(RestartPolicy(budget=2), Deadlines(), gang=True)


class Pair:
    """Two members and their gang, wired as the daemon wires them."""

    def __init__(self) -> None:
        self.gang = Gang("prefill/0", (A, B))
        self.ranks: dict[RankName, Rank] = {name: initial(name) for name in (A, B)}
        self.refused: set[RankName] = set()  # whose spawn fails

    @property
    def states(self) -> dict[RankName, RankState]:
        return {name: rank.state for name, rank in self.ranks.items()}

    def phase(self) -> GangState:
        return self.gang.state

    def both(self, event: Event) -> Pair:
        return self.send(A, event).send(B, event)

    def send(self, member: RankName, event: Event) -> Pair:
        self._deliver(member, event)
        self._tell(Changed(self.states))
        self._start_together()
        return self

    def ready(self) -> Pair:
        for name, rank in self.ranks.items():
            self.send(name, ReadyReported(rank.incarnation))
        return self

    def ended(self, member: RankName, code: int = -9) -> Pair:
        return self.send(member, Exited(self.ranks[member].incarnation, code))

    def backed_off(self, member: RankName) -> Pair:
        return self.send(member, TimerFired(Timer.BACKOFF, self.ranks[member].incarnation))

    def _deliver(self, member: RankName, event: Event) -> None:
        self.ranks[member], actions = step(self.ranks[member], event, 0.0, RULES)
        check(self.ranks[member])
        for action in actions:
            if isinstance(action, TellGang):
                self._tell(Faulted(member, action.reason, self.states))
            elif isinstance(action, Spawn) and member in self.refused:
                self._deliver(member, SpawnFailed("refused"))

    def _tell(self, event: gangs.GangEvent) -> None:
        self.gang, tells = gangs.step(self.gang, event)
        for tell in tells:
            self._deliver(tell.member, tell.event)

    def _start_together(self) -> None:
        if gangs.may_start(self.gang, self.states):
            for member in self.gang.members:
                self._deliver(member, DependenciesReady())
            self._tell(Changed(self.states))


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    alive = any(state in ALIVE for state in pair.states.values())
    assert (pair.phase() is not GangState.IDLE) == alive


def running(pair: Pair) -> Pair:
    pair.both(StartRequested()).ready()
    assert pair.phase() is GangState.RUNNING
    return pair


def test_nobody_starts_before_all_wait(pair: Pair) -> None:
    pair.send(A, StartRequested())
    assert pair.states[A] is WAITING
    pair.send(B, StartRequested())
    assert pair.states == {A: STARTING, B: STARTING}
    assert pair.phase() is GangState.FORMING


def test_it_runs_once_all_are_ready(pair: Pair) -> None:
    pair.both(StartRequested()).send(A, ReadyReported(Incarnation(1)))
    assert pair.phase() is GangState.FORMING
    pair.send(B, ReadyReported(Incarnation(1)))
    assert pair.phase() is GangState.RUNNING


@pytest.mark.parametrize("formed", [True, False])
def test_one_dies_all_die_and_all_come_again_together(pair: Pair, formed: bool) -> None:
    pair.both(StartRequested())
    if formed:
        pair.ready()
    pair.ended(A)
    assert pair.phase() is GangState.BREAKING
    assert pair.states == {A: RankState.BACKOFF, B: RankState.STOPPING}
    assert pair.ranks[B].reason == "prefill/0.0 of its gang was lost: killed by SIGKILL"
    pair.backed_off(A)
    assert pair.states[A] is WAITING  # B's process is still there
    pair.ended(B)
    assert pair.phase() is GangState.IDLE
    pair.backed_off(B)
    assert pair.states == {A: STARTING, B: STARTING}
    assert [rank.incarnation for rank in pair.ranks.values()] == [2, 2]


def test_a_member_that_hangs_is_a_loss_before_it_is_dead(pair: Pair) -> None:
    running(pair).send(A, TimerFired(Timer.DEAD, Incarnation(1)))
    assert pair.states == {A: RankState.STOPPING, B: RankState.STOPPING}
    pair.ended(A).ended(B)


def test_both_dying_at_once_is_one_break(pair: Pair) -> None:
    running(pair).ended(A).ended(B)
    assert pair.states == {A: RankState.BACKOFF, B: RankState.BACKOFF}
    assert [len(rank.faults) for rank in pair.ranks.values()] == [1, 1]


def test_a_spawn_that_fails_takes_back_the_others_start(pair: Pair) -> None:
    pair.refused = {A}
    pair.both(StartRequested())
    assert pair.states == {A: RankState.BACKOFF, B: RankState.STOPPING}
    pair.refused = set()
    pair.ended(B).backed_off(A).backed_off(B)
    assert pair.states == {A: STARTING, B: STARTING}


def test_a_hopeless_member_keeps_the_gang_down(pair: Pair) -> None:
    pair.both(StartRequested()).send(A, FatalReported(Incarnation(1), "missing key", restartable=False))
    pair.ended(A, 1).ended(B).backed_off(B)
    assert pair.states == {A: RankState.FAILED, B: WAITING}
    assert not gangs.may_start(pair.gang, pair.states)
    pair.send(A, RestartRequested())
    assert pair.states == {A: STARTING, B: STARTING}


def test_a_restart_of_one_member_restarts_both(pair: Pair) -> None:
    running(pair).send(A, RestartRequested()).send(A, TimerFired(Timer.DRAIN, Incarnation(1)))
    assert pair.states == {A: RankState.STOPPING, B: READY}
    pair.ended(A, 0)
    assert pair.states == {A: WAITING, B: RankState.STOPPING}
    pair.ended(B).backed_off(B)
    assert pair.states == {A: STARTING, B: STARTING}


def test_a_restart_of_one_member_while_they_form_restarts_both(pair: Pair) -> None:
    pair.both(StartRequested()).send(A, RestartRequested())
    assert pair.states == {A: RankState.STOPPING, B: RankState.STOPPING}
    pair.ended(A, -15).ended(B).backed_off(B)
    assert pair.states == {A: STARTING, B: STARTING}


def test_a_stop_of_all_lets_all_drain(pair: Pair) -> None:
    running(pair).both(StopRequested())
    assert pair.states == {A: RankState.DRAINING, B: RankState.DRAINING}
    for member in (A, B):
        pair.send(member, TimerFired(Timer.DRAIN, Incarnation(1)))
    pair.ended(A, 0).ended(B, 0)
    assert pair.states == {A: RankState.STOPPED, B: RankState.STOPPED}


def test_a_restart_of_all_lets_the_last_one_drain_and_costs_nothing(pair: Pair) -> None:
    running(pair).both(RestartRequested()).send(A, DrainedReported(Incarnation(1))).ended(A, 0)
    assert pair.states == {A: WAITING, B: RankState.DRAINING}
    pair.send(B, DrainedReported(Incarnation(1))).ended(B, 0)
    assert pair.states == {A: STARTING, B: STARTING}
    assert not pair.ranks[A].faults
    assert not pair.ranks[B].faults


def test_a_restart_of_all_while_they_form_costs_nothing(pair: Pair) -> None:
    pair.both(StartRequested()).both(RestartRequested()).ended(A, -15).ended(B)
    assert pair.states == {A: STARTING, B: STARTING}
    assert not pair.ranks[B].faults


def test_its_budget_ends_the_gang(pair: Pair) -> None:
    pair.both(StartRequested())
    for _ in range(RULES.restart.budget):
        pair.ended(A).ended(B).backed_off(A).backed_off(B)
    pair.ended(A).ended(B)
    assert pair.states == {A: RankState.FAILED, B: RankState.FAILED}


def test_a_second_fault_while_breaking_tells_nobody_again() -> None:
    gang = Gang("prefill/0", (A, B), GangState.BREAKING)
    states = {A: RankState.STOPPING, B: RankState.STOPPING}
    assert gangs.step(gang, Faulted(B, "x", states)) == (gang, [])


def test_only_members_with_a_process_are_told() -> None:
    third = RankName("prefill/0.2")
    gang = Gang("prefill/0", (A, B, third), GangState.FORMING)
    after, tells = gangs.step(gang, Faulted(A, "x", {A: RankState.BACKOFF, B: STARTING, third: WAITING}))
    assert after.state is GangState.BREAKING
    assert tells == [Tell(B, PeerLost("prefill/0.0 of its gang was lost: x"))]


def test_the_one_that_faulted_is_not_told_of_itself() -> None:
    gang = Gang("prefill/0", (A, B), GangState.RUNNING)
    _, tells = gangs.step(gang, Faulted(A, "x", {A: RankState.STOPPING, B: READY}))
    assert [tell.member for tell in tells] == [B]


def test_none_starts_before_the_gang_knows_that_all_are_down() -> None:
    assert gangs.may_start(Gang("prefill/0", (A, B)), {A: WAITING, B: WAITING})
    assert not gangs.may_start(Gang("prefill/0", (A, B), GangState.BREAKING), {A: WAITING, B: WAITING})


def test_every_pair_is_decided() -> None:
    missing = {
        (state, kind)
        for state in GangState
        for kind in (Changed, Faulted)
        if kind not in gangs.TRANSITIONS[state] and kind not in gangs.IGNORED[state]
    }
    assert not missing
