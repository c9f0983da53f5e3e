"""What a killed guard left behind: adopted by us, who are the next subreaper, and ended at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

from epdctl.launch import procs
from epdctl.launch.procs import Process, ProcessRef

__all__ = ["Orphans"]

_log = logging.getLogger(__name__)

_LOOK_AGAIN = 0.02  # seconds; only where the end of a process cannot be waited for


class Orphans:
    """One hunt: kill all that carries the dead guard's mark, reap it, look again; ``done`` when nothing is found.

    Only children of this process are reaped, each by its own pid; other children of ours are left alone.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        mark: str,
        since: int,  # the guard's start time
        owns: Callable[[int], bool],  # is this pid a living guard?
        done: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._mark = f"{procs.GUARD_MARK}={mark}".encode()
        self._since = since
        self._owns = owns
        self._done = done
        self._dying: dict[ProcessRef, int] = {}  # → pidfd
        self._session = os.getsid(0)
        self._pause = 0.0 if procs.probe().pidfd else _LOOK_AGAIN

    def hunt(self) -> None:
        table = procs.snapshot()
        ours = [process for process in table.values() if process.parent == os.getpid()]
        family = procs.subtree(table, ours)
        roots = [process for process in family.values() if self._is_orphan(process)]
        found = procs.subtree(table, roots).values()
        for process in found:
            self._end(process)
        if not found:
            self._done()
        elif not self._dying:
            self._loop.call_later(self._pause, self.hunt)  # zombies only, reaped just now: are they the last?

    def _is_orphan(self, process: Process) -> bool:
        """By its mark; or, for a child of ours whose environment is gone because it is ending, by its descent.

        Such a child began after the guard, is no guard itself, and lives in a session of its own: what this process
        starts for itself stays in its session.
        """
        environment = procs.environment(process.pid)
        if environment:
            return self._mark in environment and not self._owns(process.pid)
        adopted = process.parent == os.getpid() and process.session != self._session
        return adopted and process.start_time >= self._since and not self._owns(process.pid)

    def _end(self, process: Process) -> None:
        if process.zombie:
            with contextlib.suppress(ChildProcessError):  # its own parent, about to end, has yet to leave it to us
                os.waitpid(process.pid, os.WNOHANG)
        elif process.ref not in self._dying:
            self._kill(process.ref)

    def _kill(self, ref: ProcessRef) -> None:
        with contextlib.suppress(ProcessLookupError):
            pidfd = procs.open_pidfd(ref.pid)
            if pidfd is not None:
                self._dying[ref] = pidfd
                self._loop.add_reader(pidfd, self._died, ref)
            try:
                procs.kill(ref)
            except PermissionError:
                _log.error("process %d changed its user and may not be killed; waiting for its own end", ref.pid)

    def _died(self, ref: ProcessRef) -> None:
        pidfd = self._dying.pop(ref)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        if not self._dying:
            self.hunt()
