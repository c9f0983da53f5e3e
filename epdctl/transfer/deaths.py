"""Tells when a process of this machine has ended, by the kernel's own word."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

__all__ = ["DeathWatch", "birth"]

POLL_SECONDS = 0.5  # only where the kernel has no pidfd


class DeathWatch:
    """Calls ``died`` once when the process ``pid`` has ended, on the running loop; never after ``close``.

    ``born``: see ``birth``. Raises ProcessLookupError when there is no such process, or another one by now.
    """

    def __init__(self, pid: int, born: int, died: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._pid = pid
        self._born = born
        self._died = died
        self._timer: asyncio.TimerHandle | None = None
        self._fd: int | None = None
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise
        except OSError:
            self._look_later()
        else:
            self._loop.add_reader(self._fd, self._ended)
        if not self._lives():  # asked when nobody can take its number unseen any more
            self.close()
            raise ProcessLookupError(pid)

    def _lives(self) -> bool:
        """So it is taken where nobody can say, out of descriptors: what it may still write to stays its own."""
        try:
            return birth(self._pid) == self._born
        except ProcessLookupError:
            return False
        except OSError:
            return True

    def _look(self) -> None:
        if self._lives():
            self._look_later()
        else:
            self._ended()

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(POLL_SECONDS, self._look)

    def _ended(self) -> None:
        self.close()
        self._died()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


def birth(pid: int) -> int:
    """When the process began, in the kernel's ticks. Raises ProcessLookupError."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
