"""What ``up`` and ``down`` do, from the plan to the proof that nothing is left."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from epdctl.cli.attach import Interrupted, News, Session, longest_start
from epdctl.cli.console import data, say
from epdctl.cli.inbox import Inbox
from epdctl.cli.leftovers import Footprint, await_nothing
from epdctl.cli.sweeping import clear, dead_runs
from epdctl.cli.tables import event_line
from epdctl.control.cluster import ClusterRef, find_cluster, start_daemon
from epdctl.control.handover import CUT_LOOSE
from epdctl.errors import EpdError, NotRunning, RankError
from epdctl.topology.plan import Plan

__all__ = ["detached", "foreground", "take_down"]


def detached(plan: Plan, wait_timeout: float | None) -> None:
    """Return when every rank is ready; whatever goes wrong before, leave nothing behind and raise."""
    inbox: Inbox[News] = Inbox()
    with inbox.catching_signals(), _lifeline() as lifeline:
        session = Session(_started(plan, lifeline), inbox)
        try:
            session.await_ready(_seconds(plan, wait_timeout))
        except (EpdError, Interrupted) as error:
            _stop(session)
            raise _explained(error, session.cluster) from error
        lifeline.cut_loose()
    _announce(session.cluster)


def foreground(plan: Plan, wait_timeout: float | None) -> None:
    """Stay until somebody asks for the end, then drain and stop."""
    inbox: Inbox[News] = Inbox()
    with inbox.catching_signals(), _lifeline() as lifeline:
        session = Session(_started(plan, lifeline), inbox)
        try:
            ready = session.await_ready(_seconds(plan, wait_timeout))
            session.write(partial(_announce, session.cluster))
            session.serve(ready)
        except (EpdError, Interrupted) as error:
            _stop(session)
            raise _explained(error, session.cluster) from error
        _stop(session)


def take_down(name: str | None, *, drain_s: float | None, force: bool) -> None:
    """Idempotent. Raises RankError, saying what, when something is left."""
    try:
        cluster = find_cluster(name, os.environ)
    except NotRunning as error:
        if not _clear_dead(name or os.environ.get("EPDCTL_CLUSTER")):
            say(f"{error.message}: nothing to take down")
        return
    footprint = Footprint.of(cluster)
    for event in cluster.client.down(drain_s=drain_s, force=force):
        say(event_line(event))
    _prove(cluster, footprint)


@dataclass(frozen=True, slots=True)
class _Lifeline:
    """A pipe whose only writer is this process: when it is gone, however it went, the daemon stops."""

    reader: int
    writer: int

    def cut_loose(self) -> None:
        """The daemon is to outlive this process."""
        os.write(self.writer, CUT_LOOSE)


@contextmanager
def _lifeline() -> Generator[_Lifeline]:
    reader, writer = os.pipe()
    try:
        yield _Lifeline(reader, writer)
    finally:
        os.close(reader)
        os.close(writer)


def _started(plan: Plan, lifeline: _Lifeline) -> ClusterRef:
    daemon = start_daemon(plan, lifeline=lifeline.reader)
    for note in plan.notes:
        say(f"note: {note}")
    return daemon.cluster


def _seconds(plan: Plan, wait_timeout: float | None) -> float:
    return longest_start(plan) if wait_timeout is None else wait_timeout


def _announce(cluster: ClusterRef) -> None:
    say(f"{cluster.name}: every rank is ready")
    if cluster.record.gateway:
        data(cluster.record.gateway)


def _stop(session: Session) -> None:
    footprint = Footprint.of(session.cluster)
    session.stop()
    _prove(session.cluster, footprint)


def _clear_dead(name: str | None) -> bool:
    """A daemon that was killed cannot clean up: do it in its place. Whether there was anything to clear."""
    found = dead_runs(os.environ, name)
    for dead in found:
        say(f"removing what a dead run left: {dead}")
        left = clear(dead)
        if left:
            raise RankError("\n".join(left))
    return bool(found)


def _prove(cluster: ClusterRef, footprint: Footprint) -> None:
    _clear_dead(cluster.name)
    left = await_nothing(footprint)
    if left:
        text = "\n".join(f"{cluster.name} is down, but this is left: {thing}" for thing in left)
        raise RankError(text, hint="`epdctl doctor --sweep` removes what is left of dead runs")
    say(f"{cluster.name}: down, nothing is left")


def _explained(error: EpdError | Interrupted, cluster: ClusterRef) -> BaseException:
    if isinstance(error, Interrupted):
        return KeyboardInterrupt()
    if error.hint is None:
        error.hint = f"it was taken down again; `epdctl logs --cluster {cluster.name}` still has what the ranks wrote"
    return error
