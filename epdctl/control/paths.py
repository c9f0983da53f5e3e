"""Where a cluster lives on disk: its run directory, its state directory, and who holds them. Reads, never writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from epdctl.ids import RunId
from epdctl.topology.names import check_name

__all__ = [
    "ClusterDir",
    "Holder",
    "Record",
    "RunState",
    "all_runs",
    "cluster_dirs",
    "process_start",
    "runs_of",
    "runtime_base",
    "state_base",
]

T = TypeVar("T")


class Holder(msgspec.Struct, frozen=True):
    """What the lock file says: the process that holds it. ``start_time`` tells it from a later one with its pid."""

    pid: int
    start_time: int  # clock ticks since boot
    run: RunId

    @property
    def alive(self) -> bool:
        return process_start(self.pid) == self.start_time


class Record(msgspec.Struct, frozen=True):
    """``daemon.json``: what others may know of a running daemon. Never the token."""

    pid: int
    start_time: int
    run: RunId
    protocol: int
    state_dir: str
    source: str
    gateway: str | None
    ports: list[int] = []  # every TCP port of the cluster
    ranks: list[str] = []  # their names, in the plan's order
    drain_s: float = 30.0  # how long a rank may go on with what it has, and then …
    kill_s: float = 5.0  # … until it is killed


@dataclass(frozen=True, slots=True)
class ClusterDir:
    """The run directory of one cluster; it exists only while the cluster does."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def record(self) -> Path:
        return self.path / "daemon.json"

    @property
    def control(self) -> Path:
        return self.path / "control.sock"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks.sock"

    @property
    def sockets(self) -> Path:
        return self.path / "s"

    def holder(self) -> Holder | None:
        """Who last held the lock; ask ``alive`` whether it still does."""
        return _read(self.lock, Holder)

    def read_record(self) -> Record | None:
        return _read(self.record, Record)

    @property
    def running(self) -> bool:
        holder = self.holder()
        return holder is not None and holder.alive


@dataclass(frozen=True, slots=True)
class RunState:
    """What one run of a cluster leaves for later reading."""

    path: Path

    @property
    def run(self) -> RunId:
        return RunId(self.path.name)

    @property
    def cluster(self) -> str:
        return self.path.parent.name

    @property
    def changed_ns(self) -> int:
        """Of unix time: when something last happened to it; once the run is over, its end."""
        try:
            return self.events.stat().st_mtime_ns
        except OSError:
            return _changed(self.path)

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def daemon_log(self) -> Path:
        return self.logs / "daemon.log"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def captures(self) -> Path:
        return self.path / "captures"


def runtime_base(environ: Mapping[str, str]) -> Path:
    """The directory of all run directories: short, because a unix socket's path ends at 107 bytes."""
    if chosen := environ.get("EPDCTL_RUNTIME_DIR"):
        return Path(chosen).absolute()
    if session := environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "epdctl"
    return Path(tempfile.gettempdir()) / f"epdctl-{os.getuid()}"


def state_base(environ: Mapping[str, str]) -> Path:
    """The directory of what outlives a cluster: logs, events, captures."""
    if chosen := environ.get("EPDCTL_STATE_DIR"):
        return Path(chosen).absolute()
    if state := environ.get("XDG_STATE_HOME"):
        return Path(state) / "epdctl"
    return Path(environ.get("HOME") or Path.home()) / ".local" / "state" / "epdctl"


def cluster_dirs(environ: Mapping[str, str]) -> list[ClusterDir]:
    """Every run directory, by name, live or stale."""
    return [ClusterDir(path) for path in sorted(_directories(runtime_base(environ)))]


def runs_of(name: str, environ: Mapping[str, str]) -> list[RunState]:
    """The kept runs of a cluster, newest first."""
    found = list(_directories(state_base(environ) / check_name(name)))
    return [RunState(path) for path in sorted(found, key=_changed, reverse=True)]


def all_runs(environ: Mapping[str, str]) -> list[RunState]:
    """The kept runs of every cluster."""
    return [RunState(path) for cluster in _directories(state_base(environ)) for path in _directories(cluster)]


def process_start(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot; None when it is gone or only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def _directories(base: Path) -> Iterator[Path]:
    try:
        entries = list(os.scandir(base))
    except OSError:
        return
    yield from (Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # pruned meanwhile
        return 0


def _read(path: Path, kind: type[T]) -> T | None:
    """None when the file is missing or half written: both mean that nobody has said anything yet."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None
