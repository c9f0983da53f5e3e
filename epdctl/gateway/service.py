"""The gateway as a rank: binds the API's address before it says Ready, and lets requests end when it drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from epdctl.gateway.app import Desk, create_app
from epdctl.gateway.budget import Door
from epdctl.gateway.intake import Intake
from epdctl.gateway.pipeline import Pipeline
from epdctl.rank.service import Progress, Pulse
from epdctl.telemetry.metrics import GatewayMeters
from epdctl.wire.config import GatewayConfig, RankSpec
from epdctl.wire.lifecycle import Absent, Endpoints, Peer

__all__ = ["GatewayService"]

log = logging.getLogger(__name__)

BACKLOG = 1024
MOST_THREADS = 4
KEEP_ALIVE_SECONDS = 30
CLOSE_SECONDS = 2  # for answers that are being written when the gateway closes


class _Server(uvicorn.Server):
    """Signals belong to the rank's process, not to the server in it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = asyncio.Event()  # it listens, or it never will

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.settled.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(config: GatewayConfig) -> socket.socket:
    """A listening socket. Raises OSError, with EADDRINUSE for a port that is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a restart waits for TIME_WAIT to pass
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


class GatewayService:
    """Implements rank.service.Service."""

    def __init__(self, spec: RankSpec) -> None:
        config = spec.config
        self._config = config
        self._door = Door(config.limits)
        self._meters = GatewayMeters(
            inflight=lambda: self._door.open_tickets, media_bytes=lambda: self._door.held_bytes
        )
        self._pipeline = Pipeline(self._meters, config.gateway.stages, wait_seconds=config.limits.wait_seconds)
        self._pool = ThreadPoolExecutor(max(1, min(MOST_THREADS, config.threads)), thread_name_prefix="intake")
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, progress: Progress) -> Endpoints:
        """Raises LoadError, and OSError for an address that cannot be bound."""
        listener = bind(self._config.gateway)
        try:
            progress("tokenizer", 0, 1)
            intake = await asyncio.get_running_loop().run_in_executor(
                self._pool, Intake, self._config.model, self._config.limits
            )
            progress("tokenizer", 1, 1)
        except BaseException:
            listener.close()
            raise
        host, port = listener.getsockname()[:2]
        await self._serve(Desk(intake, self._pipeline, self._door, self._meters, self._pool), listener)
        return Endpoints(http=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    async def _serve(self, desk: Desk, listener: socket.socket) -> None:
        self._server = _Server(
            uvicorn.Config(
                create_app(desk),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        await self._server.settled.wait()
        if self._serving.done():
            await self._serving

    def absent_changed(self, absent: Sequence[Absent]) -> None:
        self._pipeline.absent_changed(absent)

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._pipeline.peers_changed(peers)

    def pulse(self) -> Pulse:
        unhealthy = None
        if self._serving is not None and self._serving.done() and self._door.closed is None:
            unhealthy = "the HTTP server has ended"
        return Pulse(inflight=self._door.open_tickets, completed=self._pipeline.completed, unhealthy=unhealthy)

    async def drain(self) -> None:
        self._door.closed = "the gateway is draining: try again"
        if self._server is not None:
            for server in self._server.servers:
                server.close()
        await self._door.idle.wait()

    def start_capture(self, path: str, steps: int | None, written: Callable[[str | None], None]) -> None:
        written("the gateway runs no model")

    def stop_capture(self) -> None:
        """There is never one to stop."""

    async def close(self) -> None:
        self._door.closed = "the gateway is stopping: try again"
        self._pipeline.close()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Called when nothing should be in flight: every count is back at zero."""
        self._door.check()
        self._pipeline.check()
