"""The unix stream between a rank and its supervisor: frames, limits and ends."""

from __future__ import annotations

import asyncio
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from epdctl.errors import BadMessage, DeadlineExceeded, PeerGone
from epdctl.wire.lifecycle import (
    RANK_TO_SUPERVISOR,
    SUPERVISOR_TO_RANK,
    Drain,
    Heartbeat,
    Loading,
    RankToSupervisor,
    StopCapture,
    SupervisorToRank,
)
from epdctl.wire.stream import Stream, connect, listen
from tests.support.ranks import run

Server = Stream[RankToSupervisor, SupervisorToRank]


async def pair(path: Path, handler: Callable[[Server], Awaitable[None]]) -> tuple[asyncio.Server, Stream]:
    server = await listen(path, RANK_TO_SUPERVISOR, SUPERVISOR_TO_RANK, handler)
    return server, await connect(path, SUPERVISOR_TO_RANK, RANK_TO_SUPERVISOR)


async def raw(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(path))


def test_messages_arrive_in_order_both_ways_and_the_end_is_none(sockets: Path) -> None:
    async def work() -> None:
        got: list[RankToSupervisor | None] = []

        async def serve(stream: Server) -> None:
            got.append(await stream.receive())
            got.append(await stream.receive())
            await stream.send(Drain(budget_s=2.0))
            await stream.send(StopCapture(capture="c"))

        server, stream = await pair(sockets / "s", serve)
        stream.post(Loading(phase="weights"))
        await stream.send(Heartbeat(inflight=2))
        assert [await stream.receive(), await stream.receive()] == [Drain(budget_s=2.0), StopCapture(capture="c")]
        assert await stream.receive() is None
        assert got == [Loading(phase="weights"), Heartbeat(inflight=2)]
        await stream.close()
        server.close()
        await server.wait_closed()

    run(work())


def test_the_socket_is_for_its_owner_only(sockets: Path) -> None:
    async def work() -> None:
        async def serve(_: Server) -> None: ...

        server, stream = await pair(sockets / "s", serve)
        assert stat.S_IMODE((sockets / "s").stat().st_mode) == 0o600
        await stream.close()
        server.close()
        await server.wait_closed()

    run(work())


def received_of(sockets: Path, sent: bytes) -> list[object]:
    """What a server makes of ``sent`` followed by the end of the stream."""
    seen: list[object] = []

    async def work() -> None:
        done = asyncio.Event()

        async def serve(stream: Server) -> None:
            while True:
                try:
                    message = await stream.receive()
                except BadMessage:
                    seen.append("bad")
                    continue
                except PeerGone as error:
                    seen.append(error.message)
                    break
                seen.append(message)
                if message is None:
                    break
            done.set()

        server = await listen(sockets / "s", RANK_TO_SUPERVISOR, SUPERVISOR_TO_RANK, serve)
        _, writer = await raw(sockets / "s")
        writer.write(sent)
        writer.write_eof()
        await done.wait()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    run(work())
    return seen


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def test_a_bad_frame_is_told_and_the_next_one_arrives(sockets: Path) -> None:
    good = framed(RANK_TO_SUPERVISOR.encode(Heartbeat(completed=5)))
    assert received_of(sockets, framed(b"\xc1nonsense") + good) == ["bad", Heartbeat(completed=5), None]


def test_a_length_beyond_the_limit_ends_the_stream_before_it_is_read(sockets: Path) -> None:
    (told,) = received_of(sockets, struct.pack(">I", 0xFFFFFFFF))
    assert "4294967295 bytes" in str(told)


@pytest.mark.parametrize("sent", [b"\x00", struct.pack(">I", 10), struct.pack(">I", 10) + b"abc"])
def test_an_end_inside_a_frame_is_not_an_orderly_end(sockets: Path, sent: bytes) -> None:
    assert received_of(sockets, sent) == ["the stream ended inside a frame"]


def test_a_peer_that_does_not_read_is_a_deadline_and_one_that_left_is_gone(sockets: Path) -> None:
    async def work() -> None:
        leave = asyncio.Event()

        async def serve(_: Server) -> None:
            await leave.wait()

        server, stream = await pair(sockets / "s", serve)
        big = Loading(phase="x" * 4_000_000)
        with pytest.raises(DeadlineExceeded):
            await stream.send(big, seconds=0.01)
        leave.set()
        with pytest.raises(PeerGone, match="reset"):  # it left without reading what we had sent
            await stream.receive()
        with pytest.raises(PeerGone):
            await stream.send(big)
        await stream.close()
        server.close()
        await server.wait_closed()

    run(work())


def test_nobody_listening_is_said_at_once(sockets: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(connect(sockets / "none", SUPERVISOR_TO_RANK, RANK_TO_SUPERVISOR))
