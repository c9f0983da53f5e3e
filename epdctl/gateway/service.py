"""The gateway as a rank: binds the API's address before it says Ready, and lets requests end when it drains."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from epdctl.errors import DeadlineExceeded
from epdctl.gateway.app import Desk, create_app
from epdctl.gateway.aside import Aside
from epdctl.gateway.budget import Door
from epdctl.gateway.intake import Intake
from epdctl.gateway.pipeline import Pipeline
from epdctl.gateway.remote import Fetcher
from epdctl.rank.idle import IdleCheck
from epdctl.rank.service import Ask, Progress, Pulse
from epdctl.rank.web import HttpServer, address_of, bind
from epdctl.telemetry.hops import Hops
from epdctl.telemetry.metrics import GatewayMeters
from epdctl.telemetry.ranks import rank_text
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import Absent, Endpoints, Peer
from epdctl.wire.trace import Kind

__all__ = ["GatewayService"]

log = logging.getLogger(__name__)

MOST_THREADS = 4


class GatewayService:
    """Implements rank.service.Service."""

    def __init__(self, spec: RankSpec) -> None:
        config = spec.config
        self._config = config
        self._door = Door(config.limits, config.gateway.answering)
        self._meters = GatewayMeters(
            inflight=lambda: self._door.open_tickets, media_bytes=lambda: self._door.held_bytes
        )
        self._pipeline = Pipeline(self._meters, config.gateway.stages, wait_seconds=config.limits.wait_seconds)
        self._aside = Aside(max(1, min(MOST_THREADS, config.threads)))
        self._server: HttpServer | None = None
        self._ask: Ask | None = None
        self._invariants = IdleCheck(self._check_counts)

    async def start(self, progress: Progress) -> Endpoints:
        """Raises LoadError, and OSError for an address that cannot be bound."""
        listener = bind(self._config.gateway.host, self._config.gateway.port)
        model, limits, sees = self._config.model, self._config.limits, self._pipeline.ranks.sees
        try:
            progress("tokenizer", 0, 1)
            intake = await self._aside.run(lambda: Intake(model, limits, sees=sees))
            progress("tokenizer", 1, 1)
        except BaseException:
            listener.close()
            raise
        gateway = self._config.gateway
        fetcher = Fetcher(gateway.media_hosts, seconds=gateway.media_seconds, limit=limits.max_body_bytes)
        desk = Desk(intake, self._pipeline, self._door, self._meters, self._aside, fetcher, gateway, self._rank_metrics)
        self._server = HttpServer(create_app(desk), listener)
        await self._server.start()
        return Endpoints(http=address_of(listener))

    def absent_changed(self, absent: Sequence[Absent]) -> None:
        self._pipeline.absent_changed(absent)

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._pipeline.peers_changed(peers)

    def pulse(self) -> Pulse:
        if self._door.open_tickets:
            self._invariants.busy()
        unhealthy = self._invariants.verdict(idle=not self._door.open_tickets)
        if self._server is not None and self._server.ended and self._door.closed is None:
            unhealthy = "the HTTP server has ended"
        return Pulse(
            inflight=self._door.open_tickets,
            waiting=self._pipeline.waiting,
            completed=self._pipeline.completed,
            unhealthy=unhealthy,
        )

    def take_source(self, ask: Ask) -> None:
        self._ask = ask

    async def _rank_metrics(self) -> bytes:
        """Empty where nobody can be asked."""
        if self._ask is None:
            return b""
        try:
            return rank_text(await self._ask())
        except DeadlineExceeded as error:
            log.warning("metrics without the ranks': %s", error)
            return rank_text(None)

    async def until_idle(self) -> None:
        await self._door.idle.wait()

    async def drain(self) -> None:
        self._door.closed = "the gateway is draining: try again"
        if self._server is not None:
            self._server.stop_listening()
        await self.until_idle()

    @property
    def hops(self) -> Hops:
        return self._pipeline.hops

    async def close(self) -> None:
        self._door.closed = "the gateway is stopping: try again"
        self._pipeline.close()
        if self._server is not None:
            await self._server.close()
        self._aside.close()

    def check(self) -> None:
        """Called when nothing should be in flight: every count is back at zero."""
        self._check_counts()
        self._pipeline.hops.check(Kind.REQUEST)

    def _check_counts(self) -> None:
        """What holds as soon as no ticket is out; a refusal may still be on its way to its client."""
        self._door.check()
        self._pipeline.check()
