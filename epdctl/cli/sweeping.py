"""Runs whose daemon died without cleaning up: finding them by their run directories, and removing what is left."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from epdctl.cli.checks import Check, Level
from epdctl.control.cluster import ClusterRef
from epdctl.control.paths import ClusterDir, cluster_dirs
from epdctl.launch import procs
from epdctl.supervisor.sweep import ProcessRef, find, sweep

__all__ = ["DeadRun", "check_leftovers", "clear", "dead_runs", "end_from_outside"]

_SWEEP_SECONDS = 10.0
_GUARDS_SECONDS = 5.0
SUBJECT = "leftovers"


@dataclass(frozen=True, slots=True)
class DeadRun:
    """A run directory that nobody holds, and the processes that still carry its run's id."""

    directory: ClusterDir
    processes: tuple[ProcessRef, ...]

    def __str__(self) -> str:
        pids = ", ".join(str(process.pid) for process in self.processes)
        return f"{self.directory.path}" + (f" (processes {pids})" if pids else "")


def dead_runs(environ: Mapping[str, str], name: str | None = None) -> list[DeadRun]:
    """Of this user; only of cluster ``name`` when one is given."""
    stale = [found for found in cluster_dirs(environ) if not found.running and name in (None, found.name)]
    return [DeadRun(directory, _processes(directory)) for directory in stale]


def clear(dead: DeadRun) -> list[str]:
    """Kill its processes and remove its directory; what could not be removed. A run that is just starting is left."""
    try:
        lock = os.open(dead.directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return []
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder = dead.directory.holder()
        left = sweep(holder.run, _SWEEP_SECONDS) if holder else []
        if not left:
            shutil.rmtree(dead.directory.path)
        return [f"process {process.pid} cannot be killed" for process in left]
    except BlockingIOError:  # somebody holds it: it is alive after all
        return []
    finally:
        os.close(lock)


def end_from_outside(cluster: ClusterRef) -> None:
    """SIGKILL for a daemon that does not do it itself. Its guards see that and end their ranks, with what those have
    started; what they leave carries the run's id, and is found as of any dead run."""
    daemon = ProcessRef(cluster.record.pid, cluster.record.start_time)
    if procs.kill(daemon):
        procs.wait_gone([daemon], _SWEEP_SECONDS)
    procs.wait_gone(find(cluster.record.run), _GUARDS_SECONDS)
    if cluster.state.events.exists():
        cluster.state.events.touch()  # the daemon could not say when its run was over


def check_leftovers(environ: Mapping[str, str], *, sweep: bool) -> Check:
    found = dead_runs(environ)
    if not found:
        return Check(Level.OK, SUBJECT, "none")
    text = "; ".join(map(str, found))
    if not sweep:
        return Check(Level.WARN, SUBJECT, f"of dead runs: {text}", "epdctl doctor --sweep")
    left = [thing for dead in found for thing in clear(dead)]
    if left:
        return Check(Level.FAIL, SUBJECT, f"{text}: {'; '.join(left)}", "run it as the user who owns them")
    return Check(Level.OK, SUBJECT, f"removed: {text}")


def _processes(directory: ClusterDir) -> tuple[ProcessRef, ...]:
    holder = directory.holder()
    return tuple(find(holder.run)) if holder else ()
