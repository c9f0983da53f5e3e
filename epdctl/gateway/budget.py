"""Who may come in: a bound on open requests, and one on the bytes they hold. Pure but for telling when it is idle."""

from __future__ import annotations

import asyncio

from epdctl.errors import RequestError
from epdctl.wire.config import Limits

__all__ = ["Door", "Ticket"]

RETRY_AFTER = 1  # seconds


class Door:
    """Counts tickets. Full is 429, closed is 503; both say when to come again.

    ``ranks``: how many write answers. Each works on ``limits.inflight`` requests, and ``limits.queue`` more may wait.
    """

    def __init__(self, limits: Limits, ranks: int) -> None:
        self._limits = limits
        self.capacity = limits.inflight * ranks + limits.queue
        self.open_tickets = 0
        self.held_bytes = 0
        self.closed: str | None = None  # the reason, once no new request is taken
        self.idle = asyncio.Event()
        self.idle.set()

    def enter(self) -> Ticket:
        """Raises RequestError (429, 503)."""
        if self.closed is not None:
            raise RequestError(503, self.closed, code="draining", retry_after=RETRY_AFTER)
        if self.open_tickets >= self.capacity:
            waiting = self._limits.queue
            raise RequestError(
                429,
                f"{self.open_tickets} requests are open; {self.open_tickets - waiting} may be worked on at once "
                f"(limits.inflight) and {waiting} wait (limits.queue)",
                code="full",
                retry_after=RETRY_AFTER,
            )
        self.open_tickets += 1
        self.idle.clear()
        return Ticket(self)

    def check(self) -> None:
        """Called when nothing should be in flight."""
        assert self.open_tickets == 0, f"{self.open_tickets} tickets are still out"
        assert self.held_bytes == 0, f"{self.held_bytes} bytes are still held"
        assert self.idle.is_set()

    def _take(self, nbytes: int) -> None:
        if self.held_bytes + nbytes > self._limits.media_bytes:
            raise RequestError(
                429,
                f"open requests hold {self.held_bytes} bytes of at most {self._limits.media_bytes}",
                code="full",
                retry_after=RETRY_AFTER,
            )
        self.held_bytes += nbytes

    def _leave(self, nbytes: int) -> None:
        self.held_bytes -= nbytes
        self.open_tickets -= 1
        if self.open_tickets == 0:
            self.idle.set()


class Ticket:
    """One request's right to be here, and the bytes it holds: first of its body, then of its media."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._bytes = 0
        self._keepers = 1

    def hold(self, nbytes: int) -> None:
        """Hold so many bytes in all. Raises RequestError (429) when more do not fit."""
        self._door._take(nbytes - self._bytes)
        self._bytes = nbytes

    def keep(self) -> None:
        """For work that may go on when nobody waits for the request any more."""
        self._keepers += 1

    def give_back(self) -> None:
        """By its owner, and by everyone who keeps it: it goes with the last of them."""
        assert self._keepers > 0, "given back once too often"
        self._keepers -= 1
        if self._keepers == 0:
            self._door._leave(self._bytes)
