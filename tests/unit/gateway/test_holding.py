"""What an open request holds, and for how long a client that sends slowly may hold it."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from urllib.parse import urlsplit

import pytest

from epdctl.gateway import http
from epdctl.gateway.http import body_deadline
from epdctl.gateway.intake import Intake
from epdctl.gateway.schema import ChatRequest
from epdctl.rank import connection
from epdctl.wire.serve import Prefill
from tests.support.fake_ranks import GUARD_SECONDS
from tests.unit.gateway.harness import EPD, House, ask, house, image_part, picture

NOISE = bytes(range(256)) * 16_384  # 4 MiB behind the end of a picture, which no reader looks at


def test_an_open_request_holds_its_pictures_and_not_the_body_they_came_in() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            await home.text(**ask([image_part(picture())]))  # whatever is made once
            home.cluster["prefill/0"].script.mute = True
            body = json.dumps(ask([image_part(picture() + NOISE)])).encode()
            tracemalloc.start()
            try:
                asking = asyncio.create_task(home.http.post("/v1/chat/completions", content=body))
                await home.cluster["prefill/0"].hears(Prefill, 2)
                counted = home.service._door.held_bytes
                assert counted > len(NOISE)
                async with asyncio.timeout(GUARD_SECONDS):  # the thread that read it lets go when it likes
                    while tracemalloc.get_traced_memory()[0] > 1.5 * counted:  # noqa: ASYNC110 - all: four times as much
                        await asyncio.sleep(0)
                assert not asking.done(), "it is still open"
            finally:
                tracemalloc.stop()
            asking.cancel()
            await home.idle()

    asyncio.run(scene())


def test_work_that_nobody_waits_for_holds_its_ticket_and_no_place_in_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread reads, and is busy; the clients hang up. What waits for it goes at once, what it reads stays counted
    until it is read."""
    may_read, reads = threading.Event(), 0
    read = Intake.read

    def slow_read(intake: Intake, kind: type[ChatRequest], body: bytes, *, strict: bool = False) -> ChatRequest:
        nonlocal reads
        reads += 1
        assert may_read.wait(GUARD_SECONDS)
        return read(intake, kind, body, strict=strict)

    async def scene() -> None:
        async with house(*EPD) as home:
            monkeypatch.setattr(Intake, "read", slow_read)
            body = json.dumps(ask([image_part(picture() + NOISE)])).encode()
            asking = [asyncio.create_task(home.http.post("/v1/chat/completions", content=body)) for _ in range(9)]
            await home.holds(9 * len(body))
            for each in asking:
                each.cancel()
            await home.holds(len(body))
            assert home.service._door.open_tickets == 1
            may_read.set()
            await home.idle()
            assert reads == 1, "nobody waits for the others"
            assert await home.text(**ask())

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("size", "seconds", "deadline"),
    [(0, 300, 5.0), (0, 2, 2), (64 << 10, 300, 6.0), (640 << 10, 300, 15.0), (64 << 20, 300, 30.0)],
)
def test_a_body_has_to_come_at_a_rate(size: int, seconds: float, deadline: float) -> None:
    assert body_deadline(size, seconds) == deadline


async def say(home: House, text: bytes) -> bytes:
    """All that comes back on a connection that says no more than this."""
    address = urlsplit(str(home.http.base_url))
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(text)
    async with asyncio.timeout(GUARD_SECONDS):
        answer = await reader.read()
    writer.close()
    return answer


def test_a_body_that_stops_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_GRACE", 0.01)
    monkeypatch.setattr(http, "DISCARD_SECONDS", 0.01)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n{"

    async def scene() -> None:
        async with house(*EPD, inflight=1, queue=0) as home:
            answer = await say(home, head)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"at byte 1" in answer
            assert await home.text(**ask())
            await home.idle()

    asyncio.run(scene())


@pytest.mark.parametrize("text", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: x\r\nX-"])
def test_a_connection_that_does_not_come_to_its_point_is_closed(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.01)

    async def scene() -> None:
        async with house(*EPD) as home:
            assert await say(home, text) == b""

    asyncio.run(scene())


def test_an_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)

    async def scene() -> None:
        async with house(*EPD[:3]) as home:
            asking = asyncio.create_task(home.text(**ask()))
            assert await say(home, b"") == b"", "that took as long as a head may"
            home.cluster.up(EPD[3])
            assert await asking
            await home.idle()

    asyncio.run(scene())


def test_no_series_is_there_twice() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            await home.text(**ask())
            assert "_created" not in (await home.http.get("/metrics")).text

    asyncio.run(scene())


def test_what_is_wrong_with_a_picture_is_told_without_our_objects() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            for media in (b"hello", picture()[:40]):
                response = await home.chat(**ask([image_part(media)]))
                assert response.status_code == 400
                assert "0x" not in response.text
                assert "BytesIO" not in response.text

    asyncio.run(scene())


def test_a_developer_is_a_system() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            words = []
            for role in ("developer", "system"):
                said = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Why?"}]
                words.append(await home.text(**ask(messages=said)))
            assert words[0] == words[1]

    asyncio.run(scene())
