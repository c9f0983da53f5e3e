"""The hops of requests through one rank, kept while a capture runs. Without one, a hop costs one look at the clock.

Lives on the rank's event loop.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from epdctl.ids import RequestId
from epdctl.wire.trace import Hop, HopList, Kind

__all__ = ["MOST_HOPS", "Hops", "Way"]

MOST_HOPS = 50_000  # a few megabytes
INNER_SHARE = 0.8  # of them may be pieces of work: a state that ends late must still find room


class Way:
    """One thing on its way through the rank, in one hop at a time. What becomes of it after ``end`` is not noted."""

    __slots__ = ("_began", "_book", "_hop", "_text", "attempt", "item", "kind", "number", "request")

    def __init__(self, book: Hops, number: int, kind: Kind, request: RequestId) -> None:
        self._book = book
        self._hop = ""
        self._began = 0
        self._text = ""
        self.number = number
        self.kind = kind
        self.request = request
        self.attempt = 1
        self.item: int | None = None

    def enter(self, hop: str, text: str = "") -> None:
        """The hop it was in ends, and ``hop`` begins."""
        now = self._book.clock()
        self._leave(now)
        self._hop, self._began, self._text = hop, now, text

    def within(self, name: str, began: int | None = None, ended: int | None = None, text: str = "") -> None:
        """A piece of work inside the present hop, from its beginning to now where no times are given."""
        if not self._book.recording or not self._hop:
            return
        since = self._began if began is None else began
        until = self._book.clock() if ended is None else ended
        self._book.keep(self._hop_of(name, since, until, inner=True, text=text))

    def end(self) -> None:
        self._leave(self._book.clock())
        self._hop = ""
        self._book.forget(self)

    def as_it_is(self) -> Hop:
        """The hop that it is in, without an end."""
        return self._as_hop(None)

    def _leave(self, now: int) -> None:
        if self._hop and self._book.recording:
            self._book.keep(self._as_hop(now))

    def _as_hop(self, ended: int | None) -> Hop:
        return self._hop_of(self._hop, self._began, ended, text=self._text)

    def _hop_of(self, name: str, began: int, ended: int | None, *, inner: bool = False, text: str = "") -> Hop:
        return Hop(
            kind=self.kind,
            request=self.request,
            attempt=self.attempt,
            item=self.item,
            way=self.number,
            name=name,
            began=began,
            ended=ended,
            inner=inner,
            text=text,
        )


class Hops:
    """All ways through one rank. ``clock``: nanoseconds of unix time, which profilers write too."""

    def __init__(self, clock: Callable[[], int] = time.time_ns, *, most: int = MOST_HOPS) -> None:
        self.clock = clock
        self._most = most
        self._numbers = itertools.count(1)
        self._open: dict[int, Way] = {}
        self._kept: list[Hop] | None = None
        self._left_out = 0

    @property
    def recording(self) -> bool:
        return self._kept is not None

    def begin(self, kind: Kind, request: RequestId, hop: str, *, attempt: int = 1, item: int | None = None) -> Way:
        """Whoever begins a way ends it."""
        way = Way(self, next(self._numbers), kind, request)
        self._open[way.number] = way
        way.attempt, way.item = attempt, item
        way.enter(hop)
        return way

    def start(self) -> None:
        """Keep every hop that ends from now on; what was kept before is dropped."""
        self._kept = []
        self._left_out = 0

    def stop(self) -> HopList:
        """What was kept, and where everything is that has not ended. Nothing is kept from now on."""
        for way in self._open.values():
            self.keep(way.as_it_is())
        kept, self._kept = self._kept or [], None
        return HopList(until=self.clock(), hops=kept, left_out=self._left_out)

    def keep(self, hop: Hop) -> None:
        if self._kept is None:
            return
        if len(self._kept) < (self._most * INNER_SHARE if hop.inner else self._most):
            self._kept.append(hop)
        else:
            self._left_out += 1

    def forget(self, way: Way) -> None:
        self._open.pop(way.number, None)

    def check(self, kind: Kind) -> None:
        """Called when nothing of ``kind`` should be in flight."""
        left = [way.as_it_is() for way in self._open.values() if way.kind is kind]
        assert not left, f"ways that nobody ended: {left}"
