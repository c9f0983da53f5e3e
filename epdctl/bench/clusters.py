"""A cluster for one measurement: a real daemon in a place of its own, taken down whatever happens."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from epdctl.control.client import Client
from epdctl.control.cluster import DaemonProcess, start_daemon
from epdctl.errors import EpdError, RankFailed
from epdctl.topology.plan import Plan
from epdctl.wire.control import RankState, StatusReply

__all__ = ["GUARD_SECONDS", "Say", "await_ready", "environment", "kill", "running"]

GUARD_SECONDS = 60.0  # against hanging for ever
Say = Callable[[str], None]


def environment(folder: Path) -> dict[str, str]:
    """A place of its own, so that no other cluster of this user is seen or disturbed."""
    return dict(os.environ) | {"EPDCTL_RUNTIME_DIR": str(folder / "run"), "EPDCTL_STATE_DIR": str(folder / "state")}


@contextmanager
def running(plan: Plan, environ: dict[str, str]) -> Generator[DaemonProcess]:
    daemon = start_daemon(plan, environ=environ)
    try:
        yield daemon
    finally:
        _end(daemon)


def _end(daemon: DaemonProcess) -> None:
    """Take it down; one that was killed only has to be reaped."""
    try:
        for _ in daemon.cluster.client.down(force=True):
            pass
    except EpdError:
        kill(daemon.pid)
    daemon.wait()


def await_ready(client: Client) -> StatusReply:
    """Raises RankFailed for a rank that was given up."""
    for reply in client.watch():
        for status in reply.ranks:
            if status.state is RankState.FAILED:
                raise RankFailed(status.rank, status.reason, status.log_tail)
        if all(status.state is RankState.READY for status in reply.ranks):
            return reply
    raise EpdError("the daemon ended before its ranks were ready")


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
