"""The last resort: find by its mark what a run left behind (daemon and guard killed together), and end it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from epdctl.ids import RunId
from epdctl.launch import procs
from epdctl.launch.procs import ProcessRef

__all__ = ["ProcessRef", "find", "kill_all", "sweep"]


def find(run_id: RunId) -> list[ProcessRef]:
    """Every process of this user that was started for ``run_id``, ourselves excepted."""
    found = procs.marked(procs.snapshot().values(), procs.RUN_MARK, run_id)
    return [process.ref for process in found if process.pid != os.getpid()]


def kill_all(refs: Iterable[ProcessRef]) -> list[ProcessRef]:
    """SIGKILL to each that is still the same process; returns those that were."""
    return [ref for ref in refs if procs.kill(ref)]


def sweep(run_id: RunId, seconds: float, clock: Callable[[], float] = time.monotonic) -> list[ProcessRef]:
    """Kill what is left of a run until nothing is, or ``seconds`` passed. Returns what is left then; blocks.

    It looks again after each round: a process may have forked between the look and the signal.
    """
    deadline = clock() + seconds
    while found := find(run_id):
        left = deadline - clock()
        if left <= 0:
            return found
        procs.wait_gone(kill_all(found), left, clock)
    return []
