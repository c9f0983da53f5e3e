"""The event log: appended to a file for later, the newest kept in memory for whoever asks now."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from epdctl.ids import Incarnation, RankName
from epdctl.supervisor.bell import Bell
from epdctl.wire.control import Event, RankState
from epdctl.wire.message import to_json

__all__ = ["EventLog"]

log = logging.getLogger(__name__)

KEPT = 4096
LONGEST_FILE = 64 << 20  # bytes; then a new one is begun, and the one before is kept


class EventLog:
    """Times are seconds on ``clock`` since the log was opened; the file holds one JSON object a line."""

    def __init__(self, path: Path, clock: Callable[[], float], wall: Callable[[], float] = time.time) -> None:
        self.bell = Bell()
        self._clock = clock
        self._wall = wall
        self._began = clock()
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._count = 0
        self._path = path
        self._file = path.open("ab", buffering=0)  # an event is in the file before its consequences are

    @property
    def count(self) -> int:
        """Events recorded so far: the place to go on from."""
        return self._count

    def record(
        self,
        kind: str,
        text: str = "",
        *,
        rank: RankName | None = None,
        incarnation: Incarnation | None = None,
        state: RankState | None = None,
    ) -> None:
        event = Event(
            at=self._clock() - self._began,
            wall=self._wall(),
            kind=kind,
            rank=rank,
            incarnation=incarnation,
            state=state,
            text=text,
        )
        self._kept.append(event)
        self._count += 1
        self._write(event)
        self.bell.ring()

    def since(self, place: int) -> list[Event]:
        """The events after the first ``place``, as far as they are kept."""
        fresh = min(self._count - place, len(self._kept))
        return list(self._kept)[len(self._kept) - fresh :] if fresh > 0 else []

    async def read(self, *, follow: bool, tail: int | None) -> AsyncGenerator[Event, None]:
        """The last ``tail`` events (None: all that are kept), then, following, each new one until the log is closed."""
        place = 0 if tail is None else max(0, self._count - tail)
        while True:
            heard, last = self.bell.rings, self.closed or not follow
            fresh, place = self.since(place), self._count
            for event in fresh:
                yield event
            if last:
                return
            await self.bell.wait(heard)

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        """Nothing more will happen; whoever follows comes to the end."""
        self._file.close()
        self.bell.ring()

    def _write(self, event: Event) -> None:
        try:
            if self._file.tell() > LONGEST_FILE:
                self._turn_over()
            self._file.write(to_json(event) + b"\n")
        except OSError as error:  # a full disk must not take the cluster down; the daemon's log says so
            log.error("cannot write to the event log: %s", error)

    def _turn_over(self) -> None:
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._file.close()
        self._file = self._path.open("ab", buffering=0)
