"""A service that has nothing in flight is held to its own invariants: what has leaked is found where it leaked."""

from __future__ import annotations

import logging
from collections.abc import Callable

__all__ = ["IdleCheck"]

log = logging.getLogger(__name__)


class IdleCheck:
    """``check`` raises AssertionError. It runs once for each time that the service becomes idle, with a pulse."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._due = False
        self._broken: str | None = None

    def busy(self) -> None:
        """Something is in flight."""
        self._due = True

    def verdict(self, *, idle: bool) -> str | None:
        """What the last check found wrong: the rank is unhealthy until one finds nothing, or it is restarted."""
        if idle and self._due:
            self._due = False
            self._broken = self._found()
        return self._broken

    def _found(self) -> str | None:
        try:
            self._check()
        except AssertionError as error:
            log.exception("an invariant is broken, and nothing is in flight")
            return f"with nothing in flight, {error}"
        return None
