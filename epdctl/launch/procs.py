"""Processes as /proc shows them: who descends from whom, and who carries a mark in its environment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = [
    "GUARD_MARK",
    "RUN_MARK",
    "Capabilities",
    "Process",
    "ProcessRef",
    "become_subreaper",
    "environment",
    "kill",
    "marked",
    "open_pidfd",
    "probe",
    "read",
    "snapshot",
    "subtree",
    "wait_gone",
]

RUN_MARK = "EPDCTL_RUN"  # in the environment of every process of a cluster: the id of its run
GUARD_MARK = "EPDCTL_GUARD"  # … and one id per launch

_LOOK_AGAIN = 0.02  # seconds; only where the end of a process cannot be waited for
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process for ever: a pid comes again, a pid with its start time does not."""

    pid: int
    start_time: int  # clock ticks since boot


@dataclass(frozen=True, slots=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    start_time: int
    zombie: bool

    @property
    def ref(self) -> ProcessRef:
        return ProcessRef(self.pid, self.start_time)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this system offers for keeping processes; shown to people where something is missing."""

    pidfd: bool
    subreaper: bool

    @property
    def missing(self) -> list[str]:
        gaps = []
        if not self.pidfd:
            gaps.append("pidfd: the end of a process is seen through its lifeline, a little later")
        if not self.subreaper:
            gaps.append("subreaper: what a killed rank started in its own session is found by the sweep only")
        return gaps


def probe() -> Capabilities:
    """Ask the kernel, changing nothing."""
    fd = open_pidfd(os.getpid())
    if fd is not None:
        os.close(fd)
    value = ctypes.c_int(0)
    return Capabilities(pidfd=fd is not None, subreaper=_prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value)))


def become_subreaper() -> bool:
    """Orphans among our descendants become our children. False where the kernel cannot do that."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: object) -> bool:
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    return prctl is not None and prctl(option, argument, 0, 0, 0) == 0


def open_pidfd(pid: int) -> int | None:
    """A descriptor that turns readable when ``pid`` ends. None without pidfds; ProcessLookupError when it is gone."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):
        return None


def snapshot() -> dict[int, Process]:
    """Every process of this machine, by pid."""
    found = (read(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return {process.pid: process for process in found if process is not None}


def read(pid: int) -> Process | None:
    """None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may hold anything, parentheses included: what counts comes after the last one.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), fields[0] in b"ZX")


def marked(table: Iterable[Process], key: str, value: str) -> list[Process]:
    """Those of ``table`` that were started with ``key=value``; other users' and zombies cannot be told and are not."""
    wanted = f"{key}={value}".encode()
    return [process for process in table if wanted in (environment(process.pid) or ())]


def environment(pid: int) -> list[bytes] | None:
    """What ``pid`` was started with; empty once it has begun to end; None when it is gone or not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return [entry for entry in file.read().split(b"\0") if entry]
    except OSError:
        return None


def subtree(table: dict[int, Process], roots: Iterable[Process]) -> dict[int, Process]:
    """``roots`` and all that descends from them, by pid."""
    children: dict[int, list[Process]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process)
    found: dict[int, Process] = {}
    ahead = list(roots)
    while ahead:
        process = ahead.pop()
        if process.pid not in found:
            found[process.pid] = process
            ahead.extend(children.get(process.pid, []))
    return found


def kill(ref: ProcessRef, number: signal.Signals = signal.SIGKILL) -> bool:
    """Signal this very process and no later one with its pid. False when it is gone."""
    try:
        fd = open_pidfd(ref.pid)
        try:
            process = read(ref.pid)  # read after the pidfd was opened: what it says holds for the pidfd
            if process is None or process.start_time != ref.start_time:
                return False
            if fd is None:
                os.kill(ref.pid, number)
            else:
                signal.pidfd_send_signal(fd, number)
            return True
        finally:
            if fd is not None:
                os.close(fd)
    except ProcessLookupError:
        return False


def wait_gone(refs: Iterable[ProcessRef], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Return when all of ``refs`` ended or ``seconds`` passed. A zombie has ended: its parent has yet to reap it.

    Without pidfds it returns after a short pause, and the caller looks again.
    """
    deadline = clock() + seconds
    poll = select.poll()
    with contextlib.ExitStack() as stack:
        waiting = 0
        for ref in refs:
            with contextlib.suppress(ProcessLookupError):
                fd = open_pidfd(ref.pid)
                if fd is None:
                    time.sleep(min(_LOOK_AGAIN, seconds))
                    return
                stack.callback(os.close, fd)
                poll.register(fd, select.POLLIN)
                waiting += 1
        while waiting and (left := deadline - clock()) > 0:
            for fd, _ in poll.poll(left * 1000 + 1):
                poll.unregister(fd)
                waiting -= 1
