"""WHERE a rank runs: the interface between the daemon and whatever makes processes.

A handle is not a pid: the launcher of one machine has one, a cluster's may not.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Command", "Exit", "Handle", "Launcher"]


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start, exactly: nothing of the parent's environment is added."""

    argv: Sequence[str]
    env: Mapping[str, str]
    spec: bytes  # what the process reads from its standard input, to the end
    log: Path  # its standard output and error, appended


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process and everything it had started ended.

    ``code``: exit status, or minus the signal's number. ``by``: "rank", or "guard" when the guard died first.
    """

    code: int
    by: str = "rank"
    error: str | None = None  # why the command could not be executed at all; then nothing of it ever ran


class Handle(Protocol):
    """One started process. After ``ended`` was called, nothing of it is left, grandchildren included."""

    @property
    def pid(self) -> int | None:
        """The rank's own pid, once known."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """SIGTERM asks the rank to leave; SIGKILL ends the whole tree, guard included. Dead ones are fine."""
        ...


class Launcher(Protocol):
    def launch(self, command: Command, ended: Callable[[Exit], None]) -> Handle:
        """Start ``command``; ``ended`` is called once, on the event loop. Raises OSError when nothing was started."""
        ...

    async def close(self) -> None:
        """Kill whatever is left and forget it."""
        ...
