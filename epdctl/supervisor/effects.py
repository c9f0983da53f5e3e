"""What the daemon does to the world for one rank: spawn, signal, speak, arm timers. Decides nothing."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Callable
from functools import partial

from epdctl.control.logfiles import log_path
from epdctl.ids import Incarnation
from epdctl.launch.base import Command, Exit, Launcher
from epdctl.supervisor.eventlog import EventLog
from epdctl.supervisor.logs import drop_old
from epdctl.supervisor.member import Life, Member
from epdctl.supervisor.rundir import RunDir
from epdctl.supervisor.states.actions import Arm, Disarm, DisarmAll, SendDrain, Signal, Spawn
from epdctl.supervisor.states.endings import how_it_went
from epdctl.supervisor.states.events import Event, Exited, SpawnFailed, Timer, TimerFired
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import SPEC, Drain, SupervisorToRank

__all__ = ["LAST_WORDS_SECONDS", "MAX_BACKLOG", "Effect", "Effects"]

log = logging.getLogger(__name__)

MAX_BACKLOG = 1 << 20  # bytes a rank may leave unread before it is killed
LAST_WORDS_SECONDS = 0.5  # after the end of a process, for reading what it had said before

_UNREAD = f"killed: it left more than {MAX_BACKLOG >> 10} KiB of its supervisor's messages unread"

Effect = Spawn | Signal | SendDrain | Arm | Disarm | DisarmAll
Post = Callable[[Member, Event], None]


class Effects:
    """``post`` takes what follows from an effect later: exits, and timers that fired."""

    def __init__(self, rundir: RunDir, launcher: Launcher, events: EventLog, post: Post) -> None:
        self._rundir = rundir
        self._launcher = launcher
        self._events = events
        self._post = post
        self.token = secrets.token_hex(32)  # every Hello of this run presents it

    def perform(self, member: Member, effect: Effect) -> None:
        match effect:
            case Spawn(incarnation):
                self._spawn(member, incarnation)
            case Signal(number):
                _signal(member, number)
            case SendDrain(seconds):
                self.tell(member, Drain(budget_s=seconds))
            case Arm(timer, seconds):
                self._arm(member, timer, seconds)
            case Disarm(timer):
                _disarm(member, timer)
            case DisarmAll():
                for timer in list(member.timers):
                    _disarm(member, timer)

    def tell(self, member: Member, message: SupervisorToRank) -> None:
        """Say it without waiting; kill a rank that leaves too much unread rather than keep it for ever."""
        life = member.life
        if life is None or life.stream is None or life.deaf:
            return
        if life.stream.backlog <= MAX_BACKLOG:
            life.stream.post(message)
        else:
            life.deaf = True
            log.error("%s %s", member.name, _UNREAD)
            self._events.record("deaf", _UNREAD, rank=member.name, incarnation=life.incarnation)
            _signal(member, signal.SIGKILL)

    def said_goodbye(self, member: Member, life: Life) -> None:
        """The stream has ended: if the process has too, nothing more can come from it."""
        life.stream = None
        if life.exit is not None:
            self._bury(member, life, life.exit)

    def _spawn(self, member: Member, incarnation: Incarnation) -> None:
        member.life = life = Life(incarnation)
        drop_old(self._rundir.state.logs, member.name)
        try:
            life.handle = self._launcher.launch(self._command(member, incarnation), partial(self._ended, member, life))
        except OSError as error:
            member.life = None
            self._post(member, SpawnFailed(str(error)))

    def _command(self, member: Member, incarnation: Incarnation) -> Command:
        directory = self._rundir.directory
        spec = RankSpec(
            run=self._rundir.run,
            cluster=directory.name,
            incarnation=incarnation,
            token=self.token,
            supervisor=str(directory.ranks),
            sockets=str(directory.sockets),
            config=member.planned.config,
        )
        return Command(
            argv=member.planned.argv,
            env={**member.planned.env, "EPDCTL_RUN": self._rundir.run},
            spec=SPEC.encode(spec),
            log=log_path(self._rundir.state.logs, member.name, incarnation),
        )

    def _ended(self, member: Member, life: Life, exit_: Exit) -> None:
        """Called by the launcher. What the process said before may still lie unread in its connection."""
        life.exit = exit_
        text = how_it_went(exit_.code, exit_.by)
        self._events.record("exit", text, rank=member.name, incarnation=life.incarnation)
        if life.greeted and life.stream is None:
            self._bury(member, life, exit_)
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(LAST_WORDS_SECONDS, self._bury, member, life, exit_)

    def _bury(self, member: Member, life: Life, exit_: Exit) -> None:
        if member.life is not life:  # buried already
            return
        member.life = None
        reason = _UNREAD if life.deaf else exit_.error
        self._post(member, Exited(life.incarnation, exit_.code, exit_.by, reason))

    def _arm(self, member: Member, timer: Timer, seconds: float) -> None:
        _disarm(member, timer)
        fired = TimerFired(timer, member.rank.incarnation)
        member.timers[timer] = asyncio.get_running_loop().call_later(seconds, self._post, member, fired)


def _signal(member: Member, number: signal.Signals) -> None:
    if member.life is not None and member.life.handle is not None:
        member.life.handle.signal(number)


def _disarm(member: Member, timer: Timer) -> None:
    handle = member.timers.pop(timer, None)
    if handle is not None:
        handle.cancel()
