"""All requests under way: gives each a route when there is one, and each message to the request it is for."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from epdctl.errors import RequestError
from epdctl.gateway.flight import Flight
from epdctl.gateway.intake import Order
from epdctl.gateway.ranks import Ranks, Reply
from epdctl.ids import RequestId, Stage
from epdctl.telemetry.hops import Hops, Way
from epdctl.telemetry.metrics import GatewayMeters
from epdctl.wire.lifecycle import Absent, Peer

__all__ = ["Pipeline", "new_request_id", "pause_before"]

FIRST_PAUSE = 0.05  # seconds
LONGEST_PAUSE = 1.0


def pause_before(losses: int) -> float:
    """Seconds to wait before another attempt: none after the first loss, then doubling, so that a rank which only
    says that it is leaving is not asked a thousand times. Pure."""
    if losses <= 1:
        return 0.0
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(losses - 2, 10))


def new_request_id(kind: str) -> RequestId:
    """Ours, whatever the client calls it: two clients may choose the same name."""
    return RequestId(f"{kind}-{secrets.token_hex(12)}")


def _stopping() -> RequestError:
    return RequestError(503, "the gateway is stopping", code="stopping", retry_after=1)


class Pipeline:
    """Implements flight.Director. Lives on one event loop; its clock is the loop's."""

    def __init__(self, meters: GatewayMeters, planned: Sequence[Stage] = (), *, wait_seconds: float = 30.0) -> None:
        """``wait_seconds``: how long a request without a route waits for one."""
        self._loop = asyncio.get_running_loop()
        self._meters = meters
        self.hops = Hops()
        self._ranks = Ranks(self._receive, self._withdrawn, planned)
        self._flights: dict[RequestId, Flight] = {}
        self._waiting: dict[RequestId, Flight] = {}  # in the order they came to wait
        self._wait_seconds = wait_seconds
        self._patience: dict[RequestId, asyncio.TimerHandle] = {}  # of those that wait
        self._alarms: dict[RequestId, asyncio.TimerHandle] = {}
        self._turn: asyncio.Handle | None = None
        self._closed = False
        self.completed = 0

    @property
    def ranks(self) -> Ranks:
        return self._ranks

    @property
    def meters(self) -> GatewayMeters:
        return self._meters

    @property
    def waiting(self) -> int:
        """Requests without a route."""
        return len(self._waiting)

    def now(self) -> float:
        return self._loop.time()

    def start(self, way: Way, order: Order, deadline: float) -> Flight:
        """``deadline``: on this clock. Raises RequestError (503) once closed."""
        if self._closed:
            raise _stopping()
        flight = Flight(way, order, deadline, self)
        self._flights[flight.request] = flight
        self._alarms[flight.request] = self._loop.call_at(deadline, flight.expire)
        self.wait(flight)
        return flight

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._ranks.peers_changed(peers)
        self._place_soon()

    def absent_changed(self, absent: Sequence[Absent]) -> None:
        self._ranks.absent_changed(absent)
        for flight in list(self._flights.values()):
            flight.judge()
        self._place_soon()

    def wait(self, flight: Flight) -> None:
        pause = pause_before(flight.losses.count)
        if pause:
            self._loop.call_later(pause, self._queue, flight)
        else:
            self._queue(flight)

    def landed(self, flight: Flight) -> None:
        del self._flights[flight.request]
        self._leave_queue(flight)
        self._alarms.pop(flight.request).cancel()
        self.completed += 1

    def close(self) -> None:
        """Every request still under way fails with 503; links are closed."""
        self._closed = True
        for flight in list(self._flights.values()):
            flight.fail(_stopping())
        if self._turn is not None:
            self._turn.cancel()
        self._ranks.close()

    def check(self) -> None:
        """Called when nothing should be in flight."""
        assert not self._flights, f"requests nobody waits for: {sorted(self._flights)}"
        assert not self._waiting
        assert not self._alarms
        assert not self._patience
        self._ranks.check()

    def _queue(self, flight: Flight) -> None:
        if flight.request in self._flights:  # it may have ended during its pause
            self._waiting[flight.request] = flight
            self._patience[flight.request] = self._loop.call_later(self._wait_seconds, self._out_of_patience, flight)
            self._place_soon()

    def _leave_queue(self, flight: Flight) -> None:
        if self._waiting.pop(flight.request, None) is not None:
            self._patience.pop(flight.request).cancel()

    def _out_of_patience(self, flight: Flight) -> None:
        missing = ", ".join(self._ranks.missing(media=flight.has_media))
        flight.strand(f"{missing or 'no rank took it'}; it waited {self._wait_seconds:g} s (limits.wait_seconds)")

    def _place_soon(self) -> None:
        """Not at once: while a new table is being taken over, some links still show the old one."""
        if self._turn is None and self._waiting:
            self._turn = self._loop.call_soon(self._place)

    def _place(self) -> None:
        self._turn = None
        for flight in list(self._waiting.values()):
            route = self._ranks.route(media=flight.has_media, avoid=flight.losses.avoid)
            if route is not None:
                self._leave_queue(flight)
                flight.place(route)
            elif hopeless := self._ranks.hopeless(media=flight.has_media):
                flight.strand("; ".join(hopeless))

    def _receive(self, peer: Peer, message: Reply) -> None:
        flight = self._flights.get(RequestId(message.request))
        if flight is None or not flight.receive(peer, message):
            self._meters.late.inc()

    def _withdrawn(self, peer: Peer) -> None:
        for flight in list(self._flights.values()):
            flight.withdrawn(peer)
