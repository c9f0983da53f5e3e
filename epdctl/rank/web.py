"""What every HTTP surface of a rank has in common: a bound listener, a server in our loop, clients that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp, Receive

from epdctl.errors import RequestError
from epdctl.rank.connection import MOST_CONNECTIONS, Connection
from epdctl.wire.encode import EncodeFailed, FailureKind

__all__ = ["STATUS", "HttpServer", "HungUp", "address_of", "bind", "encode_failure", "failure", "unless_hung_up"]

BACKLOG = 1024
KEEP_ALIVE_SECONDS = 30
CLOSE_SECONDS = 2  # for answers that are being written when the server closes

T = TypeVar("T")

# kind → HTTP status, seconds until another try makes sense
STATUS: dict[FailureKind, tuple[int, int | None]] = {
    FailureKind.BAD_MEDIA: (400, None),
    FailureKind.TOO_LARGE: (400, None),
    FailureKind.FULL: (429, 1),
    FailureKind.NO_RANK: (503, 1),
    FailureKind.RANK_LOST: (503, 1),
    FailureKind.DEADLINE: (504, None),
    FailureKind.INTERNAL: (502, None),
}
MEDIUM_AT_FAULT = frozenset({FailureKind.BAD_MEDIA, FailureKind.TOO_LARGE})


def failure(kind: FailureKind, text: str) -> RequestError:
    status, retry_after = STATUS[kind]
    return RequestError(status, text, code=kind.value.replace("-", "_"), retry_after=retry_after)


def encode_failure(failed: EncodeFailed, place: str) -> RequestError:
    """``place``: of the item in the request; it is named where the medium itself is at fault."""
    error = failure(failed.kind, failed.text)
    if failed.kind not in MEDIUM_AT_FAULT:
        return error
    return RequestError(error.status, f"{place}: {failed.text}", param=place, code=error.code)


class HungUp(Exception):
    """The client is gone; nobody is left to answer."""


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client disconnects; then raises HungUp.

    The body must have been read: whatever comes now is a disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HungUp
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError, with EADDRINUSE for a port that is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
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


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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


class HttpServer:
    """``app`` at ``listener``, in this loop, from ``start`` to ``close``."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._listener = listener
        self._server = _Server(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when it listens; raises what kept it from listening."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="http")
        await self._server.settled.wait()
        if self._serving.done():
            await self._serving

    @property
    def ended(self) -> bool:
        return self._serving is not None and self._serving.done()

    def stop_listening(self) -> None:
        """No new connection; those that are open go on."""
        for server in self._server.servers:
            server.close()

    async def close(self) -> None:
        if self._serving is None:
            self._listener.close()
            return
        self._server.should_exit = True
        await self._serving
