"""How far each rank's clock is ahead of ours, measured over the connection that is there (Cristian 1989, as NTP does).

Of several exchanges the one with the shortest round trip counts: the offset cannot be wrong by more than half of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from epdctl.ids import Incarnation, RankName
from epdctl.wire.lifecycle import ClockTold, TellClock

__all__ = ["EXCHANGES", "Clocks", "Exchange", "Offset", "best"]

EXCHANGES = 8  # in a row, each asked when the one before was answered
WAIT_SECONDS = 2.0  # for all of them; a rank that writes its trace answers nobody

Who = tuple[RankName, Incarnation]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer, in nanoseconds of unix time: on our clock, twice on the rank's, and on ours."""

    asked: int
    heard: int
    told: int
    received: int

    @property
    def round_trip(self) -> int:
        """What of it was spent on the way."""
        return (self.received - self.asked) - (self.told - self.heard)

    @property
    def offset(self) -> float:
        """Of the rank's clock from ours, if both ways took as long."""
        return ((self.heard - self.asked) + (self.told - self.received)) / 2


@dataclass(frozen=True, slots=True)
class Offset:
    """Microseconds that a rank's clock is ahead of ours, give or take ``uncertainty_us``."""

    us: float
    uncertainty_us: float


def best(exchanges: Iterable[Exchange]) -> Offset | None:
    """None without an exchange that can be true: a round trip below nothing is of a clock that was set meanwhile."""
    fair = [exchange for exchange in exchanges if exchange.round_trip >= 0]
    if not fair:
        return None
    quickest = min(fair, key=lambda exchange: exchange.round_trip)
    return Offset(quickest.offset / 1000, quickest.round_trip / 2000)


class Clocks:
    """The exchanges of one capture. ``tell`` speaks to a rank; ``clock``: ours, nanoseconds of unix time."""

    def __init__(self, tell: Callable[[RankName, TellClock], None], clock: Callable[[], int] = time.time_ns) -> None:
        self._tell = tell
        self._clock = clock
        self._exchanges: dict[Who, list[Exchange]] = {}
        self._left: dict[Who, int] = {}  # of the present row
        self._quiet = asyncio.Event()
        self._quiet.set()

    def ask(self, rank: RankName, incarnation: Incarnation) -> None:
        """Begin a row of exchanges."""
        self._left[rank, incarnation] = EXCHANGES
        self._quiet.clear()
        self._tell(rank, TellClock(asked=self._clock()))

    def told(self, rank: RankName, incarnation: Incarnation, message: ClockTold) -> None:
        received = self._clock()
        who = rank, incarnation
        if who not in self._left:
            return  # an answer to a row that was given up
        exchange = Exchange(message.asked, message.heard, message.told, received)
        self._exchanges.setdefault(who, []).append(exchange)
        self._left[who] -= 1
        if self._left[who] > 0:
            self._tell(rank, TellClock(asked=self._clock()))
        else:
            self.gone(rank, incarnation)

    def gone(self, rank: RankName, incarnation: Incarnation) -> None:
        """Nothing more will be told."""
        self._left.pop((rank, incarnation), None)
        if not self._left:
            self._quiet.set()

    async def settle(self, seconds: float = WAIT_SECONDS) -> None:
        """Until every row is complete, or the time is over; what is there then counts."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._quiet.wait()
        self._left.clear()
        self._quiet.set()

    def offset(self, rank: RankName, incarnation: Incarnation) -> Offset | None:
        return best(self._exchanges.get((rank, incarnation), ()))
