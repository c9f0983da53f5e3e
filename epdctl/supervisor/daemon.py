"""The one owner of a cluster's state: everything that happens is an event, handled on one loop, one at a time.

Decides nothing itself: ``states`` and ``gang`` say what an event means, ``order`` what goes first, ``effects`` does it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from epdctl.control.logfiles import log_path, tail
from epdctl.errors import UserError
from epdctl.ids import Incarnation, RankName
from epdctl.launch.base import Launcher
from epdctl.supervisor import gang as gangs
from epdctl.supervisor.bell import Bell
from epdctl.supervisor.captures import Captures
from epdctl.supervisor.compatibility import misfit
from epdctl.supervisor.effects import Effects
from epdctl.supervisor.eventlog import EventLog
from epdctl.supervisor.figures import figures_of
from epdctl.supervisor.gang import Changed, Faulted, Gang, may_start
from epdctl.supervisor.member import Life, Member, RankStream
from epdctl.supervisor.merging import run_merge
from epdctl.supervisor.order import States, before, front_of, next_to_stop
from epdctl.supervisor.peers import PeerTable
from epdctl.supervisor.proofs import Proofs
from epdctl.supervisor.report import status_reply
from epdctl.supervisor.rundir import RunDir
from epdctl.supervisor.states.actions import Action, Advertise, TellGang, Withdraw
from epdctl.supervisor.states.events import (
    DependenciesReady,
    DrainedReported,
    Event,
    FatalReported,
    HeartbeatSeen,
    ReadyReported,
    RestartRequested,
    StartRequested,
    StopRequested,
)
from epdctl.supervisor.states.rank import SETTLED, IllegalTransition, Rank, Rules
from epdctl.supervisor.states.table import step
from epdctl.topology.plan import Deadlines, Plan
from epdctl.wire.control import RankState, StatusReply
from epdctl.wire.lifecycle import (
    AskFigures,
    CaptureWritten,
    ClockTold,
    Drained,
    Fatal,
    FatalKind,
    Heartbeat,
    Hello,
    Loading,
    Proved,
    RankToSupervisor,
    Ready,
    SupervisorToRank,
    Unfit,
)
from epdctl.wire.message import PROTOCOL

__all__ = ["Daemon", "Luck"]

log = logging.getLogger(__name__)

FAILED_TAIL = 20  # lines of a failed rank's log that ``status`` shows


@dataclass(frozen=True, slots=True)
class Luck:
    """Where time and chance come from."""

    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random  # from [0, 1)


class Daemon:
    """The cluster of one plan. Made inside a running event loop; every method is called on it."""

    def __init__(self, plan: Plan, rundir: RunDir, launcher: Launcher, luck: Luck | None = None) -> None:
        self.plan = plan
        self.rundir = rundir
        self.changed = Bell()  # rung whenever ``status`` would show something new
        self.stop_asked = asyncio.Event()
        self.settled = asyncio.Event()  # a stop was asked for and every rank has ended
        self._luck = luck or Luck()
        self.events = EventLog(rundir.state.events, self._luck.clock)
        self.proofs = Proofs(self)
        self.captures = Captures(self, rundir.state.captures, partial(run_merge, rundir.run))
        self.members = {rank.rank: Member.of(rank, self._luck.clock()) for rank in plan.ranks}
        self._effects = Effects(rundir, launcher, self.events, self._post)
        self._gangs = _gangs_of(plan)
        self._peers = PeerTable()
        self._queue: deque[tuple[Member, Event]] = deque()
        self._turning = False
        self._stop = _Stop(plan.deadlines)
        self._restarting: list[Member] = []  # asked for, and to begin when those that stop first have drained

    # --- what may be asked of it ---

    @property
    def ranks(self) -> list[RankName]:
        return list(self.members)

    @property
    def stopping(self) -> bool:
        return self.stop_asked.is_set()

    @property
    def deadlines(self) -> Deadlines:
        """The plan's, with the drain that the stop was asked for with."""
        return self._stop.deadlines

    def status(self) -> StatusReply:
        return status_reply(self.plan, self.rundir.run, self.members.values(), self._luck.clock(), self.stopping)

    def start(self) -> None:
        self.events.record("command", "up")
        self._post_all(self.members.values(), StartRequested())

    def restart(self, ranks: Sequence[RankName]) -> list[RankName]:
        """Drain and start anew; a member of a gang takes its whole gang along. Returns the ranks this concerns."""
        if self.stopping:
            raise UserError("the cluster is going down, so nothing is started again")
        gangs_meant = {self.members[rank].gang for rank in ranks} - {None}
        meant = [member for member in self.members.values() if member.name in ranks or member.gang in gangs_meant]
        self.events.record("command", f"restart {' '.join(member.name for member in meant)}")
        first = next_to_stop([member.name for member in meant], self._states())
        self._restarting += [one for one in meant if one.name not in first and one not in self._restarting]
        self._post_all([member for member in meant if member.name in first], RestartRequested())
        return [member.name for member in meant]

    def stop(self, drain_s: float | None = None, force: bool = False) -> None:
        """Drain and stop every rank, in order; asked again with ``force``, kill what is left."""
        deadlines = self._stop.deadlines
        self._stop.deadlines = deadlines if drain_s is None else replace(deadlines, drain=drain_s)
        self._restarting.clear()
        self.stop_asked.set()
        self.events.record("command", "down, by force" if force else "down")
        if force:
            self._post_all(self.members.values(), StopRequested(force=True))
        self._turn()

    def post(self, rank: RankName, event: Event) -> None:
        """The one way in: ``event`` and all that follows from it have been handled when this returns."""
        self._post(self.members[rank], event)

    # --- Studio and Ranks: what captures and proofs need ---

    @property
    def cluster(self) -> str:
        return self.plan.cluster

    def connected(self, rank: RankName) -> Incarnation | None:
        life = self.members[rank].life
        return life.incarnation if life is not None and life.stream is not None else None

    def tell(self, rank: RankName, message: SupervisorToRank) -> None:
        self._effects.tell(self.members[rank], message)

    def note(self, text: str) -> None:
        self.events.record("capture", text)

    # --- Host: what ranks say ---

    def greet(self, hello: Hello, stream: RankStream) -> str | None:
        member = self.members.get(hello.rank)
        life = member.life if member is not None else None
        if not hmac.compare_digest(hello.token.encode(), self._effects.token.encode()):
            return "wrong token"
        if hello.protocol != PROTOCOL:
            return f"it speaks protocol {hello.protocol}, this supervisor {PROTOCOL}"
        if hello.run != self.rundir.run or member is None:
            return "not of this cluster"
        if life is None or life.incarnation != hello.incarnation or life.greeted:
            return "not the incarnation that is expected"
        life.stream, life.greeted = stream, True
        self._effects.tell(member, self._peers.message())
        return None

    def hear(self, hello: Hello, message: RankToSupervisor) -> None:
        member = self.members[hello.rank]
        life, number = member.life, hello.incarnation
        if life is None or life.incarnation != number:
            return
        match message:
            case Loading():
                life.loading = message
                self.changed.ring()
            case Ready():
                self._readied(member, life, message)
            case Heartbeat():
                life.beat = message
                self._post(member, HeartbeatSeen(number, message.unhealthy, message.standstill_s))
            case Drained():
                self._post(member, DrainedReported(number))
            case CaptureWritten() | ClockTold() | Proved():
                self._answered(member.name, number, message)
            case AskFigures():
                self._effects.tell(member, figures_of(self.members.values()))
            case Fatal():
                self._post(member, FatalReported(number, _last_words(message), message.restartable))
            case Hello():
                log.warning("%s said Hello twice", member.name)

    def _answered(self, rank: RankName, number: Incarnation, message: CaptureWritten | ClockTold | Proved) -> None:
        if isinstance(message, Proved):
            self.proofs.heard(rank, number, message)
        else:
            self.captures.hear(rank, number, message)

    def _readied(self, member: Member, life: Life, ready: Ready) -> None:
        serving = ((one.name, one.life.facts) for one in self.members.values() if one is not member and one.life)
        others = [(name, facts) for name, facts in serving if facts is not None]
        why = misfit(member.name, ready.facts, others) if ready.facts is not None else None
        if why is not None:
            self._effects.tell(member, Unfit(text=why))  # it leaves, and is not started again
            return
        life.endpoints, life.facts, life.transfer = ready.endpoints, ready.facts, ready.transfer
        self._post(member, ReadyReported(life.incarnation))

    def leaving(self, hello: Hello) -> bool:
        return self.members[hello.rank].rank.state is RankState.STOPPING

    def hung_up(self, hello: Hello) -> None:
        member = self.members[hello.rank]
        self.captures.died(member.name, hello.incarnation)
        self.proofs.died(member.name, hello.incarnation)
        if member.life is not None and member.life.incarnation == hello.incarnation:
            self._effects.said_goodbye(member, member.life)

    # --- one turn: an event and all that follows from it ---

    def _post(self, member: Member, event: Event) -> None:
        self._queue.append((member, event))
        self._turn()

    def _post_all(self, members: Iterable[Member], event: Event) -> None:
        """As one move, so that a gang is never seen half way."""
        self._queue.extend((member, event) for member in members)
        self._turn()

    def _turn(self) -> None:
        if self._turning:  # an effect posted; the turn that is under way will come to it
            return
        self._turning = True
        told = self._peers.version
        try:
            while self._queue or self._follow_up():
                self._handle(*self._queue.popleft())
        finally:
            self._turning = False
        self._peers.note(self.members.values())
        if self._peers.version != told:
            self._tell_peers()
        if self.stopping and all(state in SETTLED for state in self._states().values()):
            self.settled.set()
        self.changed.ring()

    def _handle(self, member: Member, event: Event) -> None:
        before = member.rank
        try:
            member.rank, actions = step(before, event, self._luck.clock(), self._rules(member))
        except IllegalTransition as error:
            log.error("%s", error.message)
            self.events.record("illegal", error.message, rank=member.name, incarnation=before.incarnation)
            return
        if before.state is not member.rank.state:
            self._moved(member, before)
        for action in actions:
            self._perform(member, action)

    def _moved(self, member: Member, before: Rank) -> None:
        rank = member.rank
        member.since = self._luck.clock()
        if rank.state is RankState.FAILED:
            member.log_tail = tail(log_path(self.rundir.state.logs, rank.name, rank.incarnation), FAILED_TAIL)
        log.info("%s: %s → %s (%s)", rank.name, before.state, rank.state, rank.reason)
        self.events.record("state", rank.reason, rank=rank.name, incarnation=rank.incarnation, state=rank.state)

    def _perform(self, member: Member, action: Action) -> None:
        match action:
            case Advertise():
                self._peers.advertise(member)
            case Withdraw():
                self._peers.withdraw(member.name)
            case TellGang(reason):
                self._move_gang(str(member.gang), Faulted(member.name, reason, self._states()))
            case _:
                self._effects.perform(member, action)

    def _follow_up(self) -> bool:
        """What follows from the states alone: gangs, starts, and the next step of a stop. True when something does."""
        for name in self._gangs:
            self._move_gang(name, Changed(self._states()))
        states = self._states()
        ready = [member for member in self.members.values() if self._may_start(member, states)]
        self._queue.extend((member, DependenciesReady()) for member in ready)
        self._queue.extend((member, RestartRequested()) for member in self._next_to_restart())
        if self.stopping:
            ranks = [rank for rank in next_to_stop(self.ranks, states) if rank not in self._stop.told]
            self._stop.told.update(ranks)
            self._queue.extend((self.members[rank], StopRequested()) for rank in ranks)
        return bool(self._queue)

    def _next_to_restart(self) -> list[Member]:
        """None while those that stop before them still finish requests."""
        front = front_of([member.name for member in self._restarting])
        draining = [name for name, member in self.members.items() if member.rank.state is RankState.DRAINING]
        if not front or any(before(name, front[0]) for name in draining):
            return []
        now = [member for member in self._restarting if member.name in front]
        self._restarting = [member for member in self._restarting if member not in now]
        return now

    def _may_start(self, member: Member, states: States) -> bool:
        if self.stopping or member.rank.state is not RankState.WAITING:
            return False
        return member.gang is None or may_start(self._gangs[member.gang], states)

    def _move_gang(self, name: str, event: Changed | Faulted) -> None:
        self._gangs[name], tells = gangs.step(self._gangs[name], event)
        self._queue.extend((self.members[tell.member], tell.event) for tell in tells)

    def _tell_peers(self) -> None:
        message = self._peers.message()
        for member in self.members.values():
            self._effects.tell(member, message)

    def _states(self) -> States:
        return {name: member.rank.state for name, member in self.members.items()}

    def _rules(self, member: Member) -> Rules:
        deadlines = self._stop.deadlines
        if patience := self.captures.patience(member.name):
            silence = {name: getattr(deadlines, name) + patience for name in ("unhealthy", "dead", "stuck")}
            deadlines = replace(deadlines, **silence)
        return Rules(self.plan.restart, deadlines, 2.0 * self._luck.chance() - 1.0, member.gang is not None)


class _Stop:
    """How far a stop has come."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self.told: set[RankName] = set()


def _gangs_of(plan: Plan) -> dict[str, Gang]:
    names = dict.fromkeys(rank.config.gang for rank in plan.ranks)
    return {
        name: Gang(name, tuple(rank.rank for rank in plan.ranks if rank.config.gang == name))
        for name in names
        if name is not None
    }


def _last_words(fatal: Fatal) -> str:
    return fatal.text if fatal.kind is FatalKind.CRASH else f"{fatal.kind}: {fatal.text}"
