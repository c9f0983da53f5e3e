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
from epdctl.cli.sweeping import clear, dead_runs, end_from_outside
from epdctl.cli.tables import draining_line, encoder_address, event_line
from epdctl.control.cluster import ClusterRef, find_cluster, list_clusters, start_daemon
from epdctl.control.handover import CUT_LOOSE
from epdctl.control.paths import runs_of
from epdctl.errors import EpdError, NotRunning, RankError, Unreachable
from epdctl.topology.plan import Plan
from epdctl.wire.control import StatusReply

__all__ = ["detached", "foreground", "take_down"]


def detached(plan: Plan, wait_timeout: float | None) -> None:
    """Return when every rank is ready; whatever goes wrong before, leave nothing behind and raise."""
    inbox: Inbox[News] = Inbox()
    with inbox.catching_signals(), _lifeline() as lifeline:
        session = Session(_started(plan, lifeline), inbox)
        try:
            ready = session.await_ready(_seconds(plan, wait_timeout))
        except (EpdError, Interrupted) as error:
            _stop(session)
            raise _explained(error, session.cluster) from error
        lifeline.cut_loose()
    _announce(session.cluster, ready)


def foreground(plan: Plan, wait_timeout: float | None) -> None:
    """Stay until somebody asks for the end, then drain and stop. Raises KeyboardInterrupt when it was not let drain."""
    inbox: Inbox[News] = Inbox()
    with inbox.catching_signals(), _lifeline() as lifeline:
        session = Session(_started(plan, lifeline), inbox)
        try:
            ready = session.await_ready(_seconds(plan, wait_timeout))
            session.write(partial(_announce, session.cluster, ready))
            session.serve(ready)
        except (EpdError, Interrupted) as error:
            _stop(session)
            raise _explained(error, session.cluster) from error
        if _stop(session):
            raise KeyboardInterrupt


def take_down(name: str | None, *, drain_s: float | None, force: bool) -> None:
    """Idempotent. With ``force`` a daemon that hangs is ended from outside.

    Raises Unreachable when it hangs otherwise; NotRunning for a name that never ran; RankError, saying what, when
    something is left.
    """
    try:
        cluster = find_cluster(name, os.environ)
    except NotRunning as error:
        _nothing_to_take_down(name or os.environ.get("EPDCTL_CLUSTER"), error)
        return
    footprint = Footprint.of(cluster)
    try:
        _ask_down(cluster, drain_s, force)
    except Unreachable as error:
        if not force and cluster.directory.running:
            raise
        _end(cluster, error)
    _prove(cluster, footprint)


def _ask_down(cluster: ClusterRef, drain_s: float | None, force: bool) -> None:
    reply = cluster.client.first_word(force)
    if not force:
        say(draining_line(reply, cluster.record.drain_s if drain_s is None else drain_s))
    for event in cluster.client.down(drain_s=drain_s, force=force):
        say(event_line(event))


def _nothing_to_take_down(name: str | None, error: NotRunning) -> None:
    if _clear_dead(name):
        return
    if name is not None and not runs_of(name, os.environ):
        running = ", ".join(found.name for found in list_clusters(os.environ))
        raise NotRunning(
            f"no cluster called {name!r} is running, and none of this name ever did",
            hint=f"running: {running}" if running else "nothing runs",
        )
    say(f"{error.message}: nothing to take down")


def _end(cluster: ClusterRef, error: EpdError) -> None:
    say(f"{error.message}\nkilling the daemon (pid {cluster.record.pid}); its ranks end with it")
    end_from_outside(cluster)


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


def _announce(cluster: ClusterRef, ready: StatusReply) -> None:
    say(f"{cluster.name}: every rank is ready")
    if (address := cluster.record.gateway or encoder_address(ready)) is not None:
        data(address)


def _stop(session: Session) -> bool:
    """Whether it was killed and not drained. Nobody else will end what was started here: a daemon that hangs is ended
    from outside."""
    footprint = Footprint.of(session.cluster)
    killed = True
    try:
        killed = session.stop()
    except Unreachable as error:
        _end(session.cluster, error)
    _prove(session.cluster, footprint)
    return killed


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
