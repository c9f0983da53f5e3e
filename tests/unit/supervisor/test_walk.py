"""Random walks of the rank machine against a model of the world: processes, timers and the advertisement."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from epdctl.ids import Incarnation, RankName
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
from epdctl.supervisor.states.rank import ALIVE, LINKED, ROUTABLE, SETTLED, IllegalTransition, Rules, check, initial
from epdctl.supervisor.states.table import TIMERS, step
from epdctl.topology.plan import Deadlines, RestartMode, RestartPolicy
from epdctl.wire.control import RankState

DEADLINES = Deadlines()


class World(RuleBasedStateMachine):
    """What the daemon would have done so far, and the rank that told it to."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = initial(RankName("encoder/0"))
        self.policy = RestartPolicy(budget=2, window=100.0)
        self.gang = False
        self.now = 0.0
        self.process: int | None = None  # incarnation
        self.advertised = False
        self.timers: dict[Timer, float] = {}  # when each fires

    # -- the daemon ---------------------------------------------------------------------------------------------------

    def send(self, event: Event) -> None:
        before = self.rank
        try:
            self.rank, actions = step(self.rank, event, self.now, Rules(self.policy, DEADLINES, 0.0, self.gang))
        except IllegalTransition:
            assert self.rank == before
            return
        for action in actions:
            self.do(action)

    def state(self) -> RankState:
        return self.rank.state

    def do(self, action: Action) -> None:
        match action:
            case Spawn(incarnation):
                assert self.process is None, "two processes of one rank"
                self.process = incarnation
            case Signal():
                assert self.process == self.rank.incarnation, "a signal to nobody"
            case SendDrain():
                assert self.process is not None
            case Arm(timer, seconds):
                assert seconds > 0
                self.timers[timer] = self.now + seconds
            case Disarm(timer):
                self.timers.pop(timer, None)  # it may have fired already
            case DisarmAll():
                self.timers.clear()
            case Advertise():
                assert not self.advertised or self.rank.state not in ROUTABLE
                self.advertised = True
            case Withdraw():
                assert self.advertised
                self.advertised = False
            case TellGang():
                assert self.gang

    # -- what can happen ----------------------------------------------------------------------------------------------

    @rule(mode=st.sampled_from(RestartMode), gang=st.booleans())
    def configure(self, mode: RestartMode, gang: bool) -> None:
        self.policy = RestartPolicy(mode=mode, budget=2, window=100.0)
        self.gang = gang

    @rule(event=st.sampled_from([StartRequested(), StopRequested(), StopRequested(force=True), RestartRequested()]))
    def ask(self, event: Event) -> None:
        self.send(event)

    @rule(event=st.sampled_from([StartRequested(), RestartRequested()]))
    def come_up(self, event: Event) -> None:
        """The way to READY, so that walks spend their time where the machine is interesting."""
        self.send(event)
        self.send(DependenciesReady())
        self.send(ReadyReported(self.rank.incarnation))

    @rule()
    def dependencies_are_ready(self) -> None:
        self.send(DependenciesReady())

    @rule()
    def lose_a_peer(self) -> None:
        self.send(PeerLost("lost"))

    @rule(behind=st.integers(0, 2), what=st.integers(0, 5))
    def hear(self, behind: int, what: int) -> None:
        """From the process, or late, from one before it."""
        number = Incarnation(self.rank.incarnation - behind)
        words: list[Event] = [
            ReadyReported(number),
            HeartbeatSeen(number),
            HeartbeatSeen(number, "sick"),
            HeartbeatSeen(number, standstill=DEADLINES.stuck),
            FatalReported(number, "fatal", restartable=True),
            DrainedReported(number),
        ]
        self.send(words[what])

    @precondition(lambda self: self.process is not None)
    @rule(restartable=st.booleans())
    def say_last_words(self, restartable: bool) -> None:
        self.send(FatalReported(self.rank.incarnation, "fatal", restartable))

    @precondition(lambda self: self.process is not None)
    @rule(code=st.sampled_from([0, 1, -9, -15]), by=st.sampled_from(["rank", "guard"]))
    def exit(self, code: int, by: str) -> None:
        self.process = None
        self.send(Exited(self.rank.incarnation, code, by))

    @precondition(lambda self: self.rank.state is RankState.STARTING)
    @rule()
    def fail_to_spawn(self) -> None:
        self.process = None
        self.send(SpawnFailed("no"))

    @precondition(lambda self: bool(self.timers))
    @rule()
    def let_the_next_timer_fire(self) -> None:
        timer = min(self.timers, key=lambda timer: self.timers[timer])
        self.now = max(self.now, self.timers.pop(timer))
        self.send(TimerFired(timer, self.rank.incarnation))

    @rule(timer=st.sampled_from(Timer), behind=st.integers(1, 2))
    def fire_a_timer_of_the_past(self, timer: Timer, behind: int) -> None:
        before = self.rank
        self.send(TimerFired(timer, Incarnation(self.rank.incarnation - behind)))
        assert self.rank == before

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def the_rank_is_possible(self) -> None:
        check(self.rank)

    @invariant()
    def a_process_exists_iff_alive(self) -> None:
        assert (self.process is not None) == (self.rank.state in ALIVE)
        assert self.process is None or self.process == self.rank.incarnation

    @invariant()
    def advertised_iff_it_may_have_links(self) -> None:
        assert self.advertised == (self.rank.state in LINKED)

    @invariant()
    def only_timers_that_the_state_keeps_run(self) -> None:
        assert all((self.rank.state, timer) in TIMERS for timer in self.timers)

    @invariant()
    def whoever_is_not_at_rest_has_a_deadline(self) -> None:
        at_rest = self.rank.state in SETTLED | {RankState.WAITING}
        assert bool(self.timers) != at_rest

    @invariant()
    def the_budget_is_kept(self) -> None:
        assert len(self.rank.faults) <= self.policy.budget

    def teardown(self) -> None:
        """Wherever the walk ended: a wanted rank is served again, or says FAILED; and a stop always ends."""
        self.policy = RestartPolicy(budget=2, window=100.0)
        self.send(StopRequested())
        self.run_until_settled()
        assert self.state() is RankState.STOPPED
        self.come_up(RestartRequested())
        assert self.state() is RankState.READY
        for _ in range(self.policy.budget):
            self.exit(-9, "rank")
            self.let_the_next_timer_fire()
            self.send(DependenciesReady())
            self.send(ReadyReported(self.rank.incarnation))
            assert self.state() is RankState.READY
        self.exit(-9, "rank")
        assert self.state() is RankState.FAILED

    def run_until_settled(self) -> None:
        for _ in range(20):
            if any(timer is Timer.KILL for timer in self.timers) and self.rank.killed:
                self.exit(-9, "rank")
            elif self.timers:
                self.let_the_next_timer_fire()


World.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase
