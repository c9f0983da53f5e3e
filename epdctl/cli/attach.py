"""Bringing a cluster up in front of a person: wait until every rank is ready, show its logs, take it down again.

The daemon does the work; this only follows it, so that losing the terminal loses nothing but the view.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from epdctl.cli.console import hush, say
from epdctl.cli.inbox import Ended, Inbox, Interrupt
from epdctl.cli.loglines import LogPrinter
from epdctl.cli.screen import screen
from epdctl.cli.tables import changes, draining_line, event_line, status_line
from epdctl.control.client import Client
from epdctl.control.cluster import ClusterRef
from epdctl.errors import DeadlineExceeded, NotRunning, RankError, RankFailed, Unreachable
from epdctl.topology.plan import Plan
from epdctl.wire.control import Event, FollowLogs, LogLine, RankState, RankStatus, StatusReply

__all__ = ["Interrupted", "News", "Session", "all_ready", "given_up", "longest_start"]

News = StatusReply | LogLine | Event
_MARGIN_SECONDS = 60.0


class Interrupted(Exception):
    """Somebody asked for the end before the cluster was ready."""


def all_ready(reply: StatusReply) -> bool:
    return bool(reply.ranks) and all(status.state is RankState.READY for status in reply.ranks)


def given_up(reply: StatusReply) -> RankStatus | None:
    """The first rank that nothing will start again: FAILED, or ended and left so by the restart policy."""
    for status in reply.ranks:
        ended = status.state is RankState.STOPPED and status.incarnation > 0
        if status.state is RankState.FAILED or ended:
            return status
    return None


def longest_start(plan: Plan) -> float:
    """Seconds after which the daemon must have every rank ready or have given one up."""
    attempts = plan.restart.budget + 1
    return attempts * (plan.deadlines.start + plan.deadlines.kill + plan.restart.maximum) + _MARGIN_SECONDS


@dataclass(frozen=True, slots=True)
class Session:
    """One cluster and the queue of what is heard of it."""

    cluster: ClusterRef
    inbox: Inbox[News]

    @property
    def client(self) -> Client:
        return self.cluster.client

    def await_ready(self, seconds: float) -> StatusReply:
        """Raises RankFailed at once when a rank is given up, RankError when somebody else takes the cluster down,
        DeadlineExceeded after ``seconds``, Interrupted."""
        deadline = time.monotonic() + seconds
        reply: StatusReply | None = None
        self.inbox.pump("watch", self.client.watch())
        with screen() as view:
            while True:
                reply = self._next_status(deadline, seconds, reply)
                view.show(reply)
                if reply.stopping:
                    raise RankError("the cluster was taken down from elsewhere before every rank was ready")
                if (lost := given_up(reply)) is not None:
                    raise RankFailed(lost.rank, lost.reason, lost.log_tail)
                if all_ready(reply):
                    return reply

    def _next_status(self, deadline: float, seconds: float, last: StatusReply | None) -> StatusReply:
        try:
            item = self.inbox.take(deadline)
        except DeadlineExceeded:
            raise DeadlineExceeded(_late(seconds, last)) from None
        match item:
            case StatusReply():
                return item
            case Interrupt():
                raise Interrupted
            case _:
                raise daemon_lost(item)

    def serve(self, ready: StatusReply) -> None:
        """Print every rank's log until somebody asks for the end. Raises Unreachable when the daemon dies."""
        printer = LogPrinter(sys.stdout)
        last = ready
        self.inbox.pump("logs", self.client.logs(FollowLogs(tail=0, follow=True)))
        while True:
            match item := self.inbox.take():
                case LogLine():
                    self.write(partial(printer.print, item))
                case StatusReply():
                    tell_all(changes(last, item))
                    last = item
                case Interrupt():
                    most = self.cluster.record.drain_s
                    say(f"{item.reason}: {draining_line(last, most)}; once more to kill")
                    return
                case Ended(source="watch") if last.stopping:
                    say("taken down from elsewhere")
                    return
                case Ended(source="watch"):
                    raise daemon_lost(item)

    def write(self, out: Callable[[], None]) -> None:
        """Call ``out``, which writes to stdout; a pipe or terminal that nobody reads any more is a wish to stop."""
        try:
            out()
        except OSError:
            hush(sys.stdout)
            self.inbox.interrupt("output closed")

    def stop(self) -> bool:
        """Take the cluster down, telling what happens; an interrupt meanwhile kills it. Whether one did.

        Raises Unreachable when the daemon does not do it.
        """
        force = False
        self.inbox.pump("down", self._down(force=False))
        while True:
            match item := self.inbox.take():
                case Event():
                    say(event_line(item))
                case Interrupt() if not force:
                    force = True
                    say(f"{item.reason}: killing")
                    self.inbox.pump("kill", self._kill())
                case Ended(source="down" | "kill"):
                    if item.error is not None and not isinstance(item.error, NotRunning):
                        raise item.error
                    if item.source == "down":
                        return force

    def _down(self, *, force: bool) -> Iterator[Event]:
        self.client.first_word(force)
        yield from self.client.down(force=force)

    def _kill(self) -> Iterator[Event]:
        """Says nothing: whoever waits for the first ``down`` hears all that follows from this one."""
        deque(self._down(force=True), maxlen=0)
        yield from ()


def _late(seconds: float, last: StatusReply | None) -> str:
    waiting = [status for status in last.ranks if status.state is not RankState.READY] if last is not None else []
    doing = [status_line(status) for status in waiting]
    return "\n".join([f"not every rank was ready within {seconds:g} s", *doing])


def daemon_lost(item: object) -> Exception:
    reason = item.error if isinstance(item, Ended) else None
    return Unreachable(
        "the daemon has gone" + (f": {reason}" if reason else ""),
        hint="it stopped on its own or was taken down from elsewhere; `epdctl logs` and `epdctl doctor` say more",
    )


def tell_all(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)
