"""How much of what is prepared for the tower may lie in memory at once. First come, first served; one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from epdctl.wire.encode import MediaItem

__all__ = ["Room"]

UNKNOWN_ROW_BYTES = 32_768  # of a kind that nothing was prepared of yet


@dataclass(slots=True)
class _Place:
    nbytes: int
    granted: asyncio.Future[None]


class Room:
    """``limit``: bytes. One medium that is larger alone has the room for itself.

    What a medium will take is known before it is prepared: its grid said how many rows it makes, and media of one kind
    take about the same for each row. What those before it took says how much; the first of all, of every rank, is the
    canary.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._waiting: deque[_Place] = deque()
        self._row_bytes: dict[str, float] = {}  # of each modality, the most that was seen

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def learn(self, item: MediaItem, nbytes: int) -> None:
        """What one medium took."""
        known = self._row_bytes.get(item.modality, 0.0)
        self._row_bytes[item.modality] = max(known, nbytes / max(1, item.rows))

    def expect(self, item: MediaItem) -> int:
        return int(item.rows * self._row_bytes.get(item.modality, UNKNOWN_ROW_BYTES))

    @asynccontextmanager
    async def hold(self, item: MediaItem) -> AsyncIterator[Callable[[int], None]]:
        """Waits for room. The caller says what it really took, once that is known; inside, it holds that."""
        place = _Place(self.expect(item), asyncio.get_running_loop().create_future())
        self._waiting.append(place)
        self._admit()

        def took(nbytes: int) -> None:
            self.learn(item, nbytes)
            self.held += nbytes - place.nbytes
            place.nbytes = nbytes
            self._admit()

        try:
            await place.granted
            yield took
        finally:
            self._leave(place)

    def _admit(self) -> None:
        while self._waiting and (self.held == 0 or self.held + self._waiting[0].nbytes <= self.limit):
            place = self._waiting.popleft()
            self.held += place.nbytes
            if not place.granted.done():
                place.granted.set_result(None)

    def _leave(self, place: _Place) -> None:
        if place in self._waiting:
            self._waiting.remove(place)
        else:
            self.held -= place.nbytes
        self._admit()
