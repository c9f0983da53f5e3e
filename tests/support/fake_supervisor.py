"""The supervisor's end of a rank's stream, and real rank processes for tests."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from epdctl.errors import PeerGone
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import (
    RANK_TO_SUPERVISOR,
    SPEC,
    SUPERVISOR_TO_RANK,
    Hello,
    Peer,
    PeersChanged,
    RankToSupervisor,
    SupervisorToRank,
)
from epdctl.wire.stream import Stream, listen
from tests.support.ranks import MODEL, Facts, make_spec

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """One rank's process, everything it said, and its stream."""

    def __init__(self, spec: RankSpec, process: asyncio.subprocess.Process) -> None:
        self.spec = spec
        self.process = process
        self.said = Facts()
        self.stream: Stream[RankToSupervisor, SupervisorToRank] | None = None
        self._versions = 0

    async def hears(self, kind: type, where: Callable[[Any], bool] = lambda _: True, number: int = 1) -> list[Any]:
        """The first messages of ``kind`` for which ``where`` holds, once there are ``number`` of them."""

        def found(seen: list[Any]) -> list[Any]:
            return [message for message in seen if isinstance(message, kind) and where(message)]

        return found(await self.said.until(lambda seen: len(found(seen)) >= number))[:number]

    async def tell(self, message: SupervisorToRank) -> None:
        assert self.stream is not None
        await self.stream.send(message)

    async def peers(self, *peers: Peer) -> None:
        self._versions += 1
        await self.tell(PeersChanged(version=self._versions, peers=list(peers)))

    async def ended(self) -> int:
        return await self.process.wait()

    async def errors(self) -> str:
        """Its standard error, once it has ended."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


class Supervisor:
    """Accepts ranks that say who they are."""

    def __init__(self, sockets: Path) -> None:
        self.sockets = sockets
        self.children: dict[str, Child] = {}

    async def serve(self, stream: Stream[RankToSupervisor, SupervisorToRank]) -> None:
        hello = await stream.receive()
        assert isinstance(hello, Hello), hello
        child = self.children[hello.rank]
        child.stream = stream
        child.said.add(hello)
        with suppress(PeerGone):  # one that was killed before it had read all resets the stream
            while (message := await stream.receive()) is not None:
                child.said.add(message)

    async def start(self, rank: str, behaviour: str = "", **config: Any) -> Child:
        config.setdefault("service", "tests.support.fake_services:FakeService")
        model = msgspec.structs.replace(MODEL, name=behaviour)
        config.setdefault("heartbeat_seconds", 0.02)
        spec = make_spec(rank, self.sockets, model=model, **config)
        child = self.children[rank] = Child(spec, await launch(SPEC.encode(spec)))
        return child


async def launch(described: bytes) -> asyncio.subprocess.Process:
    """``python -m epdctl.rank`` with ``described`` on its standard input."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "epdctl.rank",
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(described)
    process.stdin.close()
    return process


@asynccontextmanager
async def supervising(sockets: Path) -> AsyncIterator[Supervisor]:
    """Kills and reaps whatever is left."""
    supervisor = Supervisor(sockets)
    server = await listen(sockets / "ranks.sock", RANK_TO_SUPERVISOR, SUPERVISOR_TO_RANK, supervisor.serve)
    try:
        yield supervisor
    finally:
        for child in supervisor.children.values():
            if child.process.returncode is None:
                child.process.kill()
            await child.process.communicate()
        server.close()
