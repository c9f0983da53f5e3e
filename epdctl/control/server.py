"""The daemon's side of the control socket: one command a connection, answered by a ``Backend``.

Knows nothing of ranks or processes; turns errors into ``Refused`` and drops clients that do not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path

from epdctl.control.backend import Backend, replies_of
from epdctl.errors import BadMessage, EpdError, PeerGone, WireError
from epdctl.wire.control import COMMAND, REPLY, Command, Refused, Reply
from epdctl.wire.stream import Stream, listen

__all__ = ["ControlServer", "refusal"]

log = logging.getLogger(__name__)

COMMAND_SECONDS = 10.0  # from the connection to its command
READ_SECONDS = 5.0  # for a client to take a reply
MAX_CLIENTS = 64

Client = Stream[Command, Reply]


def refusal(error: EpdError) -> Refused:
    return Refused(text=error.message, exit_status=error.exit_status, kind=type(error).__name__, hint=error.hint)


class ControlServer:
    """Serves ``backend`` at one unix socket, mode 0600."""

    def __init__(self, backend: Backend) -> None:
        self._replies = replies_of(backend)
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, path: Path) -> None:
        self._server = await listen(path, COMMAND, REPLY, self._client)

    async def close(self, seconds: float) -> None:
        """Take no more clients; give those being answered ``seconds`` to read the end of it."""
        if self._server is not None:
            self._server.close()
        if self._clients:
            await asyncio.wait(self._clients, timeout=seconds)
        for task in self._clients:
            task.cancel()

    async def _client(self, stream: Client) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            await self._converse(stream)
        except WireError as error:
            log.info("dropped a control client: %s", error)
            stream.abort()
        finally:
            self._clients.discard(task)

    async def _converse(self, stream: Client) -> None:
        if len(self._clients) > MAX_CLIENTS:
            await stream.send(Refused(text=f"{MAX_CLIENTS} clients are connected already", exit_status=4))
            return
        command = await _command(stream)
        if command is not None:
            await _until_hang_up(stream, self._answer(stream, command))

    async def _answer(self, stream: Client, command: Command) -> None:
        async with contextlib.aclosing(self._told(command)) as replies:
            async for reply in replies:
                await stream.send(reply, seconds=READ_SECONDS)

    async def _told(self, command: Command) -> AsyncGenerator[Reply, None]:
        """The replies; where the backend fails, in whatever way, that is told as the last of them."""
        try:
            async with contextlib.aclosing(self._replies[type(command)](command)) as replies:
                async for reply in replies:
                    yield reply
        except EpdError as error:
            yield refusal(error)
        except Exception as error:
            log.exception("the command %s failed", type(command).__name__)
            text = f"{type(command).__name__} failed inside the daemon: {error!r}"
            yield Refused(text=text, exit_status=70, hint="the daemon's log has the traceback")


async def _command(stream: Client) -> Command | None:
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            return await stream.receive()
    except TimeoutError:
        raise PeerGone(f"said nothing for {COMMAND_SECONDS:.0f} s") from None
    except BadMessage as error:
        text = f"not a command this daemon knows: {error.message}"
        await stream.send(
            Refused(text=text, exit_status=70, hint="the CLI and the daemon may be of different versions")
        )
        return None


async def _until_hang_up(stream: Client, answer: Coroutine[object, object, None]) -> None:
    """Run ``answer``; stop it as soon as the client leaves, so that nobody follows logs for a closed terminal."""
    answering = asyncio.create_task(answer)
    listening = asyncio.create_task(stream.receive())
    try:
        await asyncio.wait((answering, listening), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (answering, listening):
            if not task.done():
                task.cancel()
    results = await asyncio.gather(answering, listening, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
