"""Is anything of a cluster left? Processes by the marks in their environment, files, shared memory, descriptors."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from epdctl.control.paths import runtime_base, state_base

__all__ = ["Leaks", "marked_processes", "no_leaks", "run_ids", "wait_gone"]

GUARD_SECONDS = 60.0  # against hanging; nothing is expected to take this long
_RUN = "EPDCTL_RUN"
_RUNTIME = "EPDCTL_RUNTIME_DIR"


@dataclass(frozen=True)
class Leaks:
    """What may be compared before and after: descriptors of this process by target, and shared memory."""

    descriptors: frozenset[str]
    shared_memory: frozenset[str]

    @classmethod
    def now(cls) -> Leaks:
        shared = Path("/dev/shm")
        return cls(
            descriptors=frozenset(_descriptors()),
            shared_memory=frozenset(os.listdir(shared)) if shared.is_dir() else frozenset(),
        )


@contextlib.contextmanager
def no_leaks(environ: Mapping[str, str]) -> Iterator[None]:
    """Afterwards nothing is left of any cluster that was started with the directories of ``environ``.

    Only shared memory of ours is looked at (names with "epdctl"), because other programs come and go.
    """
    before = Leaks.now()
    yield
    after = Leaks.now()
    left = {
        "processes": marked_processes(environ),
        "run directories": _entries(runtime_base(environ)),
        "shared memory": sorted(name for name in after.shared_memory - before.shared_memory if "epdctl" in name),
        "descriptors": sorted(after.descriptors - before.descriptors),
    }
    assert not any(left.values()), f"something is left: {left}"


def run_ids(environ: Mapping[str, str]) -> list[str]:
    """Every run of every cluster that the state directory remembers."""
    base = state_base(environ)
    return [run for cluster in _entries(base) for run in _entries(base / cluster)]


def marked_processes(environ: Mapping[str, str]) -> list[str]:
    """Daemons of this runtime directory and all that belongs to their runs, as "pid: command line"."""
    marks = {f"{_RUN}={run}".encode() for run in run_ids(environ)}
    if _RUNTIME in environ:
        marks.add(f"{_RUNTIME}={environ[_RUNTIME]}".encode())
    return [f"{pid}: {command}" for pid, command in _processes(marks) if pid != os.getpid()]


def wait_gone(pids: Iterable[int]) -> None:
    """Return when every one of these processes has ended, by whoever's hand."""
    for pid in pids:
        try:
            watcher = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([watcher], [], [], GUARD_SECONDS)[0], f"process {pid} is still there"
        finally:
            os.close(watcher)


def _processes(marks: set[bytes]) -> Iterator[tuple[int, str]]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            environment = Path("/proc", entry, "environ").read_bytes().split(b"\0")
            command = Path("/proc", entry, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone, or not ours
            continue
        if marks.intersection(environment):
            yield int(entry), command


def _descriptors() -> Iterator[str]:
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            if not target.startswith("/proc"):  # the directory that we are reading
                yield f"{entry} → {target}"


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []
