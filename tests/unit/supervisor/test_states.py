"""One named test per rule of the rank machine, and the completeness of its table."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from epdctl.ids import Incarnation, RankName
from epdctl.rank.fatal import Departure
from epdctl.supervisor.states.actions import (
    Action,
    Advertise,
    Arm,
    Disarm,
    DisarmAll,
    SendDrain,
    Signal,
    Spawn,
    TellGang,
    Withdraw,
)
from epdctl.supervisor.states.endings import MEANINGS, how_it_went
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
from epdctl.supervisor.states.rank import ALIVE, LINKED, ROUTABLE, IllegalTransition, Rank, Rules, check, initial
from epdctl.supervisor.states.table import IGNORED, TIMERS, TRANSITIONS, step
from epdctl.topology.plan import Deadlines, RestartMode, RestartPolicy
from epdctl.wire.control import RankState

POLICY = RestartPolicy(initial=1.0, maximum=8.0, budget=3, window=100.0, stable=60.0)
DEADLINES = Deadlines(start=600.0, unhealthy=5.0, dead=30.0, stuck=90.0, drain=20.0, kill=4.0)
RULES = Rules(POLICY, DEADLINES)
FIRST = Incarnation(1)
TERM, KILL = Signal(signal.SIGTERM), Signal(signal.SIGKILL)
FATAL = FatalReported(FIRST, "missing key visual.patch_embed", restartable=False)


class Life:
    """One rank on its way, with the actions of the last step."""

    def __init__(self, *events: Event, rules: Rules = RULES) -> None:
        self.rank = initial(RankName("encoder/0"))
        self.rules = rules
        self.now = 0.0
        self.actions: list[Action] = []
        self.then(*events)

    def then(self, *events: Event) -> Life:
        for event in events:
            self.rank, self.actions = step(self.rank, event, self.now, self.rules)
            check(self.rank)
        return self

    def crash(self, code: int = -9) -> Life:
        return self.then(Exited(self.rank.incarnation, code))

    def fires(self, timer: Timer) -> Life:
        return self.then(TimerFired(timer, self.rank.incarnation))

    def comes_up(self) -> Life:
        return self.then(DependenciesReady(), ReadyReported(Incarnation(self.rank.incarnation + 1)))

    @property
    def state(self) -> RankState:
        return self.rank.state

    @property
    def reason(self) -> str:
        return self.rank.reason


Make = Callable[..., Life]


def waiting(rules: Rules = RULES) -> Life:
    return Life(StartRequested(), rules=rules)


def starting(rules: Rules = RULES) -> Life:
    return waiting(rules).then(DependenciesReady())


def ready(rules: Rules = RULES) -> Life:
    return starting(rules).then(ReadyReported(FIRST))


def unhealthy(rules: Rules = RULES) -> Life:
    return ready(rules).fires(Timer.HEARTBEAT)


def draining(rules: Rules = RULES) -> Life:
    return ready(rules).then(StopRequested())


def stopping(rules: Rules = RULES) -> Life:
    return draining(rules).then(DrainedReported(FIRST))


def backing_off(rules: Rules = RULES) -> Life:
    return ready(rules).crash()


def failed() -> Life:
    return starting().then(FATAL).crash(1)


EVERY_STATE: dict[RankState, Make] = {
    RankState.STOPPED: Life,
    RankState.WAITING: waiting,
    RankState.STARTING: starting,
    RankState.READY: ready,
    RankState.UNHEALTHY: unhealthy,
    RankState.DRAINING: draining,
    RankState.STOPPING: stopping,
    RankState.BACKOFF: backing_off,
    RankState.FAILED: failed,
}


# --- coming up -------------------------------------------------------------------------------------------------------


def test_a_rank_waits_for_its_turn() -> None:
    life = waiting()
    assert (life.state, life.reason, life.actions) == (RankState.WAITING, "waiting for its turn to start", [])


def test_a_start_spawns_and_bounds_it() -> None:
    life = starting()
    assert life.state is RankState.STARTING
    assert life.actions == [Spawn(FIRST), Arm(Timer.START, 600.0)]


def test_ready_is_advertised_and_watched() -> None:
    life = ready()
    assert (life.state, life.reason) == (RankState.READY, "ready")
    assert life.actions == [
        Disarm(Timer.START),
        Arm(Timer.HEARTBEAT, 5.0),
        Arm(Timer.DEAD, 30.0),
        Arm(Timer.STABLE, 60.0),
        Advertise(),
    ]


def test_heartbeats_do_not_prolong_a_start() -> None:
    assert starting().then(HeartbeatSeen(FIRST)).actions == []


def test_a_start_that_takes_too_long_is_killed_and_spends_the_budget() -> None:
    life = starting().fires(Timer.START)
    assert (life.state, life.reason) == (RankState.STOPPING, "not ready within 600 s (deadlines.start)")
    assert life.actions == [Disarm(Timer.START), KILL, Arm(Timer.KILL, 4.0)]
    life.crash()
    assert (life.state, life.reason) == (RankState.BACKOFF, "not ready within 600 s (deadlines.start)")
    assert len(life.rank.faults) == 1


def test_a_rank_that_hangs_at_every_load_ends_failed() -> None:
    life = waiting()
    for _ in range(POLICY.budget):
        life.then(DependenciesReady()).fires(Timer.START).crash().fires(Timer.BACKOFF)
    life.then(DependenciesReady()).fires(Timer.START).crash()
    assert (life.state, life.reason) == (
        RankState.FAILED,
        "not ready within 600 s (deadlines.start); gave up after 3 restarts in 100 s",
    )


def test_a_spawn_that_fails_is_a_fault() -> None:
    life = starting().then(SpawnFailed("no space left on device"))
    assert (life.state, life.reason) == (RankState.BACKOFF, "could not be started: no space left on device")
    assert life.actions == [DisarmAll(), Arm(Timer.BACKOFF, 1.0)]


def test_news_of_a_failed_spawn_that_a_stop_overtook_ends_the_stop() -> None:
    assert starting().then(StopRequested(), SpawnFailed("no")).state is RankState.STOPPED


# --- serving ---------------------------------------------------------------------------------------------------------


def test_each_heartbeat_arms_both_watches_again() -> None:
    assert ready().then(HeartbeatSeen(FIRST)).actions == [Arm(Timer.HEARTBEAT, 5.0), Arm(Timer.DEAD, 30.0)]


def test_silence_withdraws() -> None:
    life = unhealthy()
    assert (life.state, life.reason) == (RankState.UNHEALTHY, "no heartbeat for 5 s")
    assert life.actions == [Withdraw(), Disarm(Timer.HEARTBEAT), Disarm(Timer.STABLE), Arm(Timer.SICK, 90.0)]


def test_a_ranks_own_complaint_withdraws_with_its_words() -> None:
    life = ready().then(HeartbeatSeen(FIRST, unhealthy="quarantine holds 30 % of the pool"))
    assert (life.state, life.reason) == (RankState.UNHEALTHY, "quarantine holds 30 % of the pool")
    assert life.actions[0] == Withdraw()
    assert Arm(Timer.DEAD, 30.0) in life.actions


def test_a_complaint_that_changes_is_told_anew() -> None:
    life = unhealthy().then(HeartbeatSeen(FIRST, unhealthy="another"))
    assert (life.state, life.reason, life.actions) == (RankState.UNHEALTHY, "another", [Arm(Timer.DEAD, 30.0)])


def test_a_healthy_heartbeat_brings_it_back() -> None:
    life = unhealthy().then(HeartbeatSeen(FIRST))
    assert life.state is RankState.READY
    assert life.actions[-1] == Advertise()
    assert Arm(Timer.HEARTBEAT, 5.0) in life.actions


@pytest.mark.parametrize("before", [ready, unhealthy])
def test_work_that_stands_still_kills_a_rank_that_beats(before: Make) -> None:
    life = before().then(HeartbeatSeen(FIRST, standstill=89.9))
    assert life.state is RankState.READY, "busy is not sick"
    life = before().then(HeartbeatSeen(FIRST, standstill=90.0))
    assert life.state is RankState.STOPPING
    assert life.reason == (
        "its work has stood still for 90 s (raise deadlines.stuck where one step may take that long)"
    )
    assert KILL in life.actions
    assert life.crash().state is RankState.BACKOFF


def test_a_rank_that_stays_unhealthy_by_its_own_word_is_killed_and_its_beats_do_not_save_it() -> None:
    sick = HeartbeatSeen(FIRST, unhealthy="the canary was wrong")
    life = ready().then(sick)
    assert Arm(Timer.SICK, 90.0) in life.actions
    assert life.then(sick).actions == [Arm(Timer.DEAD, 30.0)]
    assert Disarm(Timer.SICK) in ready().then(sick, HeartbeatSeen(FIRST)).actions, "unless it recovers"
    life.fires(Timer.SICK)
    assert (life.state, life.reason) == (
        RankState.STOPPING,
        "the canary was wrong; it was unhealthy for 90 s (deadlines.stuck)",
    )
    assert life.crash().state is RankState.BACKOFF


@pytest.mark.parametrize("before", [ready, unhealthy])
def test_long_silence_kills_and_restarts(before: Make) -> None:
    life = before().fires(Timer.DEAD)
    assert (life.state, life.reason) == (RankState.STOPPING, "no heartbeat for 30 s")
    assert KILL in life.actions
    assert life.crash().state is RankState.BACKOFF
    assert life.reason == "no heartbeat for 30 s"


# --- leaving by request ----------------------------------------------------------------------------------------------


def test_a_stop_drains_first() -> None:
    life = draining()
    assert (life.state, life.reason) == (RankState.DRAINING, "stop asked for")
    assert Withdraw() not in life.actions, "what it works on is not lost: its peers keep their links to it"
    assert life.actions[-3:] == [SendDrain(20.0), Arm(Timer.DRAIN, 20.0), Advertise()]
    assert Disarm(Timer.DEAD) not in life.actions  # a rank that dies while it drains is not waited for


def test_an_unhealthy_rank_drains_without_a_second_withdraw() -> None:
    life = unhealthy().then(StopRequested())
    assert life.state is RankState.DRAINING
    assert Withdraw() not in life.actions


def test_a_drained_rank_is_withdrawn_when_it_has_to_leave() -> None:
    assert draining().then(DrainedReported(FIRST)).actions[0] == Withdraw()


def test_only_a_fault_is_a_death() -> None:
    assert ready().crash().rank.died
    assert ready().fires(Timer.DEAD).rank.died
    assert not unhealthy().rank.died
    assert not draining().rank.died
    assert not draining().then(DrainedReported(FIRST)).rank.died
    assert not ready().crash().fires(Timer.BACKOFF).comes_up().rank.died


LATE = "stop asked for; not drained within 20 s, so what it had is cut off"


def test_every_status_that_a_rank_of_ours_leaves_with_has_a_meaning() -> None:
    assert set(MEANINGS) >= set(Departure) - {Departure.ASKED}
    assert how_it_went(Departure.CHECKPOINT, "rank") == "exited with status 81 (its checkpoint cannot be loaded)"
    assert how_it_went(1, "rank") == "exited with status 1"


@pytest.mark.parametrize(
    ("end", "told"), [(DrainedReported(FIRST), "stop asked for"), (TimerFired(Timer.DRAIN, FIRST), LATE)]
)
def test_after_the_drain_comes_sigterm_and_then_stopped(end: Event, told: str) -> None:
    life = draining().then(end)
    assert life.actions[-2:] == [TERM, Arm(Timer.KILL, 4.0)]
    life.crash(0)
    assert (life.state, life.reason, life.actions) == (RankState.STOPPED, told, [DisarmAll()])


def test_silence_while_draining_is_not_waited_out() -> None:
    life = draining().fires(Timer.DEAD)
    assert KILL in life.actions
    assert life.crash().state is RankState.STOPPED


def test_heartbeats_while_draining_keep_it_alive() -> None:
    assert draining().then(HeartbeatSeen(FIRST)).actions == [Arm(Timer.DEAD, 30.0)]


def test_who_ignores_sigterm_is_killed_and_that_is_told() -> None:
    life = stopping().fires(Timer.KILL)
    assert life.actions == [KILL, Arm(Timer.KILL, 4.0)]
    assert life.crash().reason == "stop asked for; ignored SIGTERM for 4 s and was killed"


def test_sigkill_is_said_again_and_the_reason_only_once() -> None:
    life = stopping().fires(Timer.KILL).fires(Timer.KILL)
    assert life.actions == [KILL, Arm(Timer.KILL, 4.0)]
    assert life.reason.count("ignored") == 1


def test_a_killed_rank_is_not_accused_of_ignoring_sigterm() -> None:
    assert ready().fires(Timer.DEAD).fires(Timer.KILL).reason == "no heartbeat for 30 s"


def test_a_starting_rank_has_nothing_to_drain() -> None:
    life = starting().then(StopRequested())
    assert life.actions[-2:] == [TERM, Arm(Timer.KILL, 4.0)]
    assert life.then(ReadyReported(FIRST)).state is RankState.STOPPING  # it became ready too late
    assert life.crash(-15).state is RankState.STOPPED


@pytest.mark.parametrize("before", [starting, ready, unhealthy, draining, stopping])
def test_a_forced_stop_kills_at_once(before: Make) -> None:
    life = before().then(StopRequested(force=True))
    assert life.state is RankState.STOPPING
    assert life.actions[-2:] == [KILL, Arm(Timer.KILL, 4.0)]
    assert SendDrain(20.0) not in life.actions
    assert life.crash().state is RankState.STOPPED


@pytest.mark.parametrize("before", [draining, stopping])
def test_a_second_stop_is_fine(before: Make) -> None:
    state = before().state
    life = before().then(StopRequested())
    assert (life.state, life.actions) == (state, [])


@pytest.mark.parametrize("before", [waiting, backing_off, failed])
def test_without_a_process_a_stop_is_immediate(before: Make) -> None:
    assert before().then(StopRequested()).state is RankState.STOPPED


def test_a_stopped_rank_that_had_failed_still_says_why() -> None:
    assert "missing key visual.patch_embed" in failed().then(StopRequested()).reason


def test_a_crash_during_a_wanted_stop_is_just_its_end() -> None:
    assert draining().crash(-11).state is RankState.STOPPED
    assert ready().fires(Timer.DEAD).then(StopRequested()).crash().state is RankState.STOPPED


# --- restarts by request ---------------------------------------------------------------------------------------------


def test_a_restart_drains_ends_and_comes_again() -> None:
    life = ready().then(RestartRequested())
    assert (life.state, life.reason) == (RankState.DRAINING, "restart asked for")
    life.then(DrainedReported(FIRST)).crash(0)
    assert life.state is RankState.WAITING
    life.comes_up()
    assert (life.state, life.rank.incarnation, counts(life)) == (RankState.READY, 2, (0, 1))
    assert life.reason == "ready; last restart: restart asked for"
    assert life.rank.faults == ()


def test_a_restart_of_a_starting_rank_needs_no_drain() -> None:
    life = starting().then(RestartRequested())
    assert TERM in life.actions
    assert life.crash(-15).state is RankState.WAITING


def test_leaving_early_while_a_restart_drains_is_the_restart() -> None:
    assert ready().then(RestartRequested()).crash(0).state is RankState.WAITING


def test_crashing_while_a_restart_drains_is_a_fault() -> None:
    life = ready().then(RestartRequested()).crash(-11)
    assert (life.state, life.reason) == (RankState.BACKOFF, "killed by SIGSEGV")


@pytest.mark.parametrize("before", [failed, backing_off])
def test_a_restart_forgives(before: Make) -> None:
    life = before().then(RestartRequested())
    assert (life.state, life.rank.faults) == (RankState.WAITING, ())


def counts(life: Life) -> tuple[int, int]:
    return life.rank.restarts, life.rank.restarts_asked


def test_a_restart_is_counted_once() -> None:
    assert counts(backing_off().then(RestartRequested()).comes_up()) == (1, 0), "it was due anyway"
    assert counts(backing_off().then(StopRequested(), StartRequested()).comes_up()) == (0, 1)
    assert counts(failed().then(RestartRequested()).comes_up()) == (0, 1)
    crashed = backing_off().fires(Timer.BACKOFF).comes_up()
    crashed.then(RestartRequested(), DrainedReported(crashed.rank.incarnation)).crash(0)
    assert counts(crashed.comes_up()) == (1, 1)


def test_a_restart_of_a_rank_that_never_ran_is_a_start() -> None:
    assert counts(Life(RestartRequested()).comes_up()) == (0, 0)


@pytest.mark.parametrize("event", [StartRequested(), RestartRequested()])
@pytest.mark.parametrize("before", [draining, stopping])
def test_a_stop_can_be_turned_into_a_restart(before: Make, event: Event) -> None:
    assert before().then(event).crash(0).state is RankState.WAITING


def test_a_restart_asked_for_during_a_kill_forgives_it() -> None:
    life = ready().fires(Timer.DEAD).then(RestartRequested()).crash()
    assert (life.state, life.rank.faults) == (RankState.WAITING, ())


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Exited(FIRST, -9), "killed by SIGKILL"),
        (Exited(FIRST, -34), "killed by SIGRTMIN"),
        (Exited(FIRST, -35), "killed by signal 35"),
        (Exited(FIRST, 1), "exited with status 1"),
        (Exited(FIRST, 0), "exited with status 0 while it was needed"),
        (Exited(FIRST, -9, by="guard"), "its guard was killed by SIGKILL"),
        (Exited(FIRST, 0, by="guard"), "its guard exited with status 0"),
        (Exited(FIRST, 127, reason_text="could not be started: /x: not found"), "could not be started: /x: not found"),
    ],
)
@pytest.mark.parametrize("before", [starting, ready, unhealthy])
def test_an_end_that_nobody_asked_for(before: Make, event: Exited, reason: str) -> None:
    life = before().then(event)
    assert (life.state, life.reason) == (RankState.BACKOFF, reason)
    assert life.actions[-2:] == [DisarmAll(), Arm(Timer.BACKOFF, 1.0)]
    assert (Withdraw() in life.actions) == (before is ready)


def test_after_the_backoff_it_comes_again_and_says_why_it_did() -> None:
    life = backing_off().fires(Timer.BACKOFF)
    assert life.state is RankState.WAITING
    life.comes_up()
    assert life.reason == "ready; last restart: killed by SIGKILL"
    assert (life.rank.incarnation, counts(life)) == (2, (1, 0))


def test_the_backoff_doubles_and_the_budget_ends_it() -> None:
    life = ready()
    delays = []
    for _ in range(POLICY.budget):
        life.crash()
        delays.append(life.actions[-1])
        life.fires(Timer.BACKOFF).comes_up()
    assert delays == [Arm(Timer.BACKOFF, seconds) for seconds in (1.0, 2.0, 4.0)]
    life.crash(1)
    assert (life.state, life.reason) == (
        RankState.FAILED,
        "exited with status 1; gave up after 3 restarts in 100 s",
    )
    assert life.actions == [Withdraw(), DisarmAll()]


def test_the_callers_jitter_is_used() -> None:
    life = ready(replace(RULES, jitter=-1.0)).crash()
    assert life.actions[-1] == Arm(Timer.BACKOFF, 0.8)


def test_faults_older_than_the_window_do_not_count() -> None:
    life = ready()
    for _ in range(3 * POLICY.budget):
        life.crash()
        assert life.state is RankState.BACKOFF
        life.fires(Timer.BACKOFF).comes_up()
        life.now += POLICY.window / POLICY.budget
    assert life.rank.restarts == 3 * POLICY.budget


def test_a_long_good_time_forgives_every_fault() -> None:
    life = ready().crash().fires(Timer.BACKOFF).comes_up()
    assert life.rank.faults
    assert life.fires(Timer.STABLE).rank.faults == ()


def test_the_good_time_begins_again_after_a_bad_one() -> None:
    assert Arm(Timer.STABLE, 60.0) in unhealthy().then(HeartbeatSeen(FIRST)).actions


def test_last_words_become_the_reason_and_end_it_when_hopeless() -> None:
    life = failed()
    assert (life.state, life.reason) == (
        RankState.FAILED,
        "exited with status 1: missing key visual.patch_embed",
    )


def test_last_words_withdraw_at_once_and_bound_the_leaving() -> None:
    life = ready().then(replace(FATAL, restartable=True))
    assert life.state is RankState.STOPPING
    assert life.actions[0] == Withdraw()
    assert life.actions[-1] == Arm(Timer.KILL, 4.0)
    assert life.fires(Timer.KILL).actions[0] == KILL
    assert life.crash().state is RankState.BACKOFF


def test_last_words_of_one_incarnation_are_not_those_of_the_next() -> None:
    life = starting().then(replace(FATAL, restartable=True)).crash(1).fires(Timer.BACKOFF).comes_up().crash(1)
    assert life.reason == "exited with status 1"


def test_last_words_read_after_the_end_still_count() -> None:
    life = starting().crash(1).then(replace(FATAL, restartable=True))
    assert (life.state, life.reason) == (RankState.BACKOFF, "exited with status 1: missing key visual.patch_embed")
    life = starting().crash(1).then(FATAL)
    assert (life.state, life.actions) == (RankState.FAILED, [DisarmAll()])


def test_last_words_during_a_stop_do_not_make_it_a_fault() -> None:
    assert stopping().then(FATAL).crash(1).state is RankState.STOPPED


def test_on_failure_leaves_a_clean_exit_alone() -> None:
    rules = replace(RULES, restart=replace(POLICY, mode=RestartMode.ON_FAILURE))
    life = ready(rules).crash(0)
    assert (life.state, life.reason) == (RankState.STOPPED, "exited with status 0 while it was needed")
    assert ready(rules).crash(1).state is RankState.BACKOFF
    assert ready(rules).then(Exited(FIRST, 0, by="guard")).state is RankState.BACKOFF


@pytest.mark.parametrize("code", [0, 1, -9])
def test_never_means_failed(code: int) -> None:
    rules = replace(RULES, restart=replace(POLICY, mode=RestartMode.NEVER))
    assert ready(rules).crash(code).state is RankState.FAILED
    assert ready(rules).then(RestartRequested()).crash(0).state is RankState.WAITING  # asked for is not a fault


# --- gangs -----------------------------------------------------------------------------------------------------------

GANG = replace(RULES, gang=True)


@pytest.mark.parametrize(
    ("life", "reason"),
    [
        (ready(GANG).crash(), "killed by SIGKILL"),
        (starting(GANG).fires(Timer.START), "not ready within 600 s (deadlines.start)"),
        (unhealthy(GANG).fires(Timer.DEAD), "no heartbeat for 30 s"),
        (starting(GANG).then(SpawnFailed("no")), "could not be started: no"),
        (ready(GANG).then(FATAL), "missing key visual.patch_embed"),
    ],
)
def test_a_fault_is_told_to_the_gang(life: Life, reason: str) -> None:
    assert life.actions[-1] == TellGang(reason)


def test_the_gang_is_told_once() -> None:
    assert TellGang("no heartbeat for 30 s") not in ready(GANG).fires(Timer.DEAD).crash().actions


def test_a_rank_without_a_gang_tells_nobody() -> None:
    assert not [action for action in ready().crash().actions if isinstance(action, TellGang)]


@pytest.mark.parametrize("before", [starting, ready, unhealthy, draining])
def test_a_lost_peer_ends_this_one_too(before: Make) -> None:
    life = before(GANG).then(PeerLost("prefill/0.1 of its gang was lost"))
    assert (life.state, life.reason) == (RankState.STOPPING, "prefill/0.1 of its gang was lost")
    assert life.actions[-2:] == [KILL, Arm(Timer.KILL, 4.0)]  # and no TellGang: it is not the origin
    assert life.crash().state is (RankState.STOPPED if before is draining else RankState.BACKOFF)


# --- the table -------------------------------------------------------------------------------------------------------

EVENTS: list[Event] = [
    StartRequested(),
    StopRequested(),
    RestartRequested(),
    DependenciesReady(),
    PeerLost("x"),
    SpawnFailed("x"),
    ReadyReported(FIRST),
    HeartbeatSeen(FIRST),
    FATAL,
    DrainedReported(FIRST),
    Exited(FIRST, 1),
]

# What raises, by state. Everything else is handled or a listed no-op; a change here is a change of the machine.
ILLEGAL = {
    RankState.STOPPED: {"SpawnFailed", "Exited"},
    RankState.WAITING: {"SpawnFailed", "Exited"},
    RankState.STARTING: {"DrainedReported"},
    RankState.READY: {"DependenciesReady", "SpawnFailed", "ReadyReported", "DrainedReported"},
    RankState.UNHEALTHY: {"DependenciesReady", "SpawnFailed", "ReadyReported", "DrainedReported"},
    RankState.DRAINING: {"DependenciesReady", "SpawnFailed", "ReadyReported"},
    RankState.STOPPING: {"DependenciesReady"},
    RankState.BACKOFF: {"DependenciesReady", "SpawnFailed", "Exited"},
    RankState.FAILED: {"DependenciesReady", "SpawnFailed", "Exited"},
}


@pytest.mark.parametrize("state", RankState)
def test_every_pair_is_decided(state: RankState) -> None:
    raised = set()
    for event in EVENTS:
        rank = replace(EVERY_STATE[state]().rank, incarnation=FIRST)
        try:
            after, actions = step(rank, event, 0.0, RULES)
        except IllegalTransition:
            raised.add(type(event).__name__)
            continue
        if type(event) in IGNORED[state]:
            assert (after, actions) == (rank, [])
    assert raised == ILLEGAL[state]


@pytest.mark.parametrize("state", RankState)
def test_no_pair_is_both_handled_and_ignored(state: RankState) -> None:
    assert not TRANSITIONS[state].keys() & IGNORED[state]


def test_the_examples_are_in_the_states_they_claim() -> None:
    assert {state: make().state for state, make in EVERY_STATE.items()} == {state: state for state in RankState}


@pytest.mark.parametrize("state", RankState)
@pytest.mark.parametrize("timer", Timer)
def test_a_timer_that_fired_before_it_was_disarmed_changes_nothing(state: RankState, timer: Timer) -> None:
    life = EVERY_STATE[state]()
    before = life.rank
    life.fires(timer)
    if (state, timer) not in TIMERS:
        assert (life.rank, life.actions) == (before, [])


def test_a_state_with_a_timer_hears_timers() -> None:
    assert {state for state, _ in TIMERS} == {state for state in RankState if TimerFired in TRANSITIONS[state]}


@pytest.mark.parametrize("state", RankState)
def test_events_of_another_incarnation_change_nothing(state: RankState) -> None:
    other = Incarnation(7)
    late: list[Event] = [
        ReadyReported(other),
        HeartbeatSeen(other, "sick"),
        FatalReported(other, "x", False),
        DrainedReported(other),
        Exited(other, 1),
        *(TimerFired(timer, other) for timer in Timer),
    ]
    rank = EVERY_STATE[state]().rank
    for event in late:
        assert step(rank, event, 0.0, RULES) == (rank, [])


def test_an_illegal_event_says_where_and_what() -> None:
    with pytest.raises(IllegalTransition, match=r"encoder/0 is ready, where DrainedReported.* it was: waiting"):
        ready().then(DrainedReported(FIRST))


def test_the_history_is_bounded() -> None:
    life = ready(replace(RULES, restart=replace(POLICY, budget=100)))
    for _ in range(50):
        life.crash().fires(Timer.BACKOFF).comes_up()
    assert len(life.rank.history) == 16
    assert life.rank.history[-1] == (RankState.READY, life.reason)


def test_check_notices_what_cannot_be() -> None:
    broken: list[Rank] = [
        replace(ready().rank, wanted=False),
        replace(initial(RankName("encoder/0")), wanted=True),
        replace(ready().rank, faulted=True),
        replace(ready().rank, incarnation=Incarnation(0)),
        replace(ready().rank, reason=""),
    ]
    for rank in broken:
        with pytest.raises(AssertionError):
            check(rank)


def test_routable_is_alive() -> None:
    assert ROUTABLE < LINKED < ALIVE
