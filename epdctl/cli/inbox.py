"""One queue for everything that can happen to a verb that stays: threads and signal handlers put, one loop takes."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from epdctl.errors import DeadlineExceeded, EpdError

__all__ = ["Ended", "Inbox", "Interrupt"]

T = TypeVar("T")
_ROOM = 1000  # items of threads that nobody has taken yet; signals are few and always fit
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Somebody wants this to end."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A source has no more to say; ``error`` when it broke off."""

    source: str
    error: Exception | None = None


class Inbox(Generic[T]):
    """Bounded for threads; a SimpleQueue inside, because its ``put`` is safe within a signal handler."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._items: queue.SimpleQueue[tuple[bool, T | Interrupt | Ended]] = queue.SimpleQueue()
        self._room = threading.Semaphore(_ROOM)
        self._clock = clock

    def pump(self, source: str, items: Iterable[T]) -> None:
        """Read ``items`` on a thread of its own until they end; then put Ended(source)."""
        threading.Thread(target=self._drain, args=(source, items), name=f"epdctl-{source}", daemon=True).start()

    def _drain(self, source: str, items: Iterable[T]) -> None:
        error: Exception | None = None
        try:
            for item in items:
                self._room.acquire()
                self._items.put((True, item))
        except EpdError as failure:
            error = failure
        except Exception as failure:  # told to the loop, which raises it
            error = failure
        self._items.put((False, Ended(source, error)))

    def interrupt(self, reason: str) -> None:
        self._items.put((False, Interrupt(reason)))

    def take(self, deadline: float | None = None) -> T | Interrupt | Ended:
        """The next item. ``deadline`` is on the inbox's clock; past it, DeadlineExceeded."""
        seconds = None if deadline is None else max(0.0, deadline - self._clock())
        try:
            counted, item = self._items.get(timeout=seconds)
        except queue.Empty:
            raise DeadlineExceeded("nothing came in time") from None
        if counted:
            self._room.release()
        return item

    @contextmanager
    def catching_signals(self) -> Generator[None]:
        """Within it, SIGINT, SIGTERM and SIGHUP are items and end nothing by themselves."""

        def put(number: int, _frame: object) -> None:
            self.interrupt(signal.Signals(number).name)

        before = {number: signal.signal(number, put) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
