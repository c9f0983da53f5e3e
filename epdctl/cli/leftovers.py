"""What a run may leave on this machine, looked for from outside: by reading /proc and the file system only.

The proof after ``down`` must not lean on the daemon that did the work.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from epdctl.control.cluster import ClusterRef
from epdctl.ids import RunId
from epdctl.supervisor.sweep import find

__all__ = ["Footprint", "await_nothing", "find_leftovers"]

_PATIENCE_SECONDS = 10.0
_PROC = Path("/proc")
_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Where a run can be seen: taken while it is up, looked for when it is down."""

    run: RunId
    directory: Path
    gateway: str | None

    @classmethod
    def of(cls, cluster: ClusterRef) -> Footprint:
        return cls(cluster.record.run, cluster.directory.path, cluster.record.gateway)


def find_leftovers(footprint: Footprint) -> list[str]:
    """One line for each thing that is still there."""
    found = [f"process {process.pid} ({_command(process.pid)})" for process in find(footprint.run)]
    if footprint.directory.exists():
        found.append(f"run directory {footprint.directory}")
    if _SHM.is_dir():
        found += [f"shared memory {path}" for path in sorted(_SHM.glob(f"*{footprint.run}*"))]
    if footprint.gateway and _listens(footprint.gateway):
        found.append(f"something that listens at {footprint.gateway}")
    return found


def await_nothing(
    footprint: Footprint,
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
    look: Callable[[Footprint], list[str]] = find_leftovers,
) -> list[str]:
    """Look until nothing is left or patience ends; what is left then."""
    deadline = clock() + _PATIENCE_SECONDS
    while (left := look(footprint)) and clock() < deadline:
        pause(0.05)
    return left


def _command(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:120]
    except OSError:
        return "gone by now"


def _listens(url: str) -> bool:
    place = urlsplit(url)
    try:
        with socket.create_connection((place.hostname or "127.0.0.1", place.port or 80), timeout=1.0):
            return True
    except OSError:
        return False
