"""Pictures from elsewhere, and the key: what is let in, and what is not. Real sockets, loopback only."""

from __future__ import annotations

import asyncio
import errno
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from epdctl.errors import RequestError
from epdctl.gateway.auth import shows_key
from epdctl.gateway.remote import Fetcher, is_reachable_for_all, target_of
from epdctl.ids import Modality, Secret
from epdctl.rank.media import Source
from epdctl.wire.config import GatewayConfig
from epdctl.wire.message import Codec, to_json
from tests.support.fake_ranks import GUARD_SECONDS
from tests.unit.gateway.harness import picture

PNG = picture()

PRIVATE = (
    "127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1",
    "64:ff9b::a00:1", "2002:a00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "not an address",
    "fec0::1", "::127.0.0.1", "64:ff9b:1::a00:1", "5f00::1", "3fff::1", "2001:db8::1", "2001:2::1", "192.88.99.1",
    "192.0.0.9", "fe80::1%eth0", "4000::1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_ones_own_house(address: str) -> None:
    assert not is_reachable_for_all(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "2001:4860:4860::8888"]
)
def test_addresses_of_the_public_internet(address: str) -> None:
    assert is_reachable_for_all(address)


ALLOWED = ("pictures.example", "other.example:8443", "10.0.0.7")
REFUSED = {
    "another host": "https://example.com/a.png",
    "a part of a name": "https://evil-pictures.example/a.png",
    "a name within": "https://pictures.example.evil.test/a.png",
    "another port": "https://pictures.example:8443/a.png",
    "the usual port of an unusual one": "https://other.example/a.png",
    "a user": "https://me@pictures.example/a.png",
    "a disguise": "https://pictures.example@evil.test/a.png",
    "a file": "file://pictures.example/a.png",
    "no host": "https:///a.png",
    "a number as address": "http://167772167/a.png",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_host_is_named_or_it_is_not(name: str) -> None:
    with pytest.raises(ValueError, match=r"host|fetched"):
        target_of(REFUSED[name], ALLOWED)


def test_allowed_hosts() -> None:
    assert target_of("https://pictures.example/a.png", ALLOWED).port == 443
    assert target_of("http://PICTURES.example/a.png", ALLOWED).port == 80
    assert target_of("https://other.example:8443/a.png", ALLOWED).port == 8443
    assert target_of("http://10.0.0.7/a.png", ALLOWED).literal


Answer = bytes | None  # None: silence


@asynccontextmanager
async def serving(answer: Callable[[str], Answer]) -> AsyncIterator[int]:
    """An HTTP server that answers a path with raw bytes, or never."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            said = answer(head)
            if said is None:
                await reader.read()
            else:
                writer.write(said)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def ok(body: bytes = PNG) -> bytes:
    return b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body


def moved(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()


def nothing(status: int) -> Callable[[str], Answer]:
    return lambda _: f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n".encode()


def at(url: str) -> dict[str, Source]:
    return {url: Source(Modality.IMAGE, "here", url)}


async def fetch(url: str, hosts: Sequence[str], *, seconds: float = 60, limit: int = 1 << 20) -> bytes:
    fetcher = Fetcher(hosts, seconds=seconds, limit=limit)
    return (await fetcher.fetch_all(at(url), lambda _: None))[url]


def refusal(answer: Callable[[str], Answer], *, seconds: float = 60, limit: int = 1 << 20) -> str:
    async def scene() -> str:
        async with serving(answer) as port:
            with pytest.raises(RequestError) as caught:
                await fetch(f"http://127.0.0.1:{port}/a", [f"127.0.0.1:{port}"], seconds=seconds, limit=limit)
            assert (caught.value.status, caught.value.param) == (400, "here")
            return caught.value.message

    return asyncio.run(scene())


def test_a_literal_address_that_is_named_is_fetched() -> None:
    async def scene() -> None:
        async with serving(lambda _: ok()) as port:
            assert await fetch(f"http://127.0.0.1:{port}/a", [f"127.0.0.1:{port}"]) == PNG

    asyncio.run(scene())


def test_the_connection_goes_to_the_checked_address_under_the_hosts_name(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[str] = []

    def answer(head: str) -> bytes:
        heads.append(head.lower())
        return ok()

    async def scene() -> None:
        async with serving(answer) as port:
            asked: list[str] = []

            async def resolve(host: str, _: int) -> list[str]:
                asked.append(host)
                return ["127.0.0.1"]

            monkeypatch.setattr("epdctl.gateway.remote.is_reachable_for_all", lambda _: True)
            fetcher = Fetcher([f"pictures.example:{port}"], seconds=60, limit=1 << 20, resolve=resolve)
            url = f"http://pictures.example:{port}/a?b=c"
            assert (await fetcher.fetch_all(at(url), lambda _: None))[url] == PNG
            assert asked == ["pictures.example"]  # once: nobody asks again on the way
            assert f"host: pictures.example:{port}\r\n" in heads[0]
            assert heads[0].startswith("get /a?b=c ")

    asyncio.run(scene())


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], []])
def test_a_name_that_leads_home_is_refused(addresses: list[str]) -> None:
    async def scene() -> None:
        async def resolve(*_: object) -> list[str]:
            return addresses

        fetcher = Fetcher(["pictures.example"], seconds=60, limit=1 << 20, resolve=resolve)
        with pytest.raises(RequestError, match=r"public internet|no address"):
            await fetcher.fetch_all(at("http://pictures.example/a"), lambda _: None)

    asyncio.run(scene())


def test_redirects_are_checked_like_the_first_address() -> None:
    assert "not in gateway.media_hosts" in refusal(lambda _: moved("http://169.254.169.254/latest"))
    assert "not file" in refusal(lambda _: moved("file:///etc/passwd"))
    assert "more than 3 redirects" in refusal(lambda _: moved("/again"))


def test_a_redirect_within_the_host_is_followed() -> None:
    async def scene() -> None:
        async with serving(lambda head: ok() if head.startswith("GET /b ") else moved("/b")) as port:
            assert await fetch(f"http://127.0.0.1:{port}/a", [f"127.0.0.1:{port}"]) == PNG

    asyncio.run(scene())


def test_what_other_hosts_do_wrong() -> None:
    assert "HTTP 404" in refusal(lambda _: b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
    for status in (300, 302, 304):  # a redirect that leads nowhere
        assert f"answered with HTTP {status}" in refusal(nothing(status))
    assert "larger than 1000" in refusal(lambda _: ok(b"x" * 5000), limit=1000)
    assert "compressed" in refusal(lambda _: b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\n\r\nxx")
    assert "cannot be fetched" in refusal(lambda _: b"what?")
    assert "did not come within" in refusal(lambda _: None, seconds=0.2)


@asynccontextmanager
async def one_slow_file(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> AsyncIterator[tuple[Fetcher, int, int]]:
    """A host has one turn, and the first host's is taken by a file that does not come; with both hosts' ports."""
    monkeypatch.setattr("epdctl.gateway.remote.AT_ONCE", 1)
    asked = asyncio.Event()

    def silent(head: str) -> Answer:
        if head.startswith("GET /slow "):
            asked.set()
            return None
        return ok()

    async with serving(silent) as slow, serving(lambda _: ok()) as quick:
        fetcher = Fetcher([f"127.0.0.1:{slow}", f"127.0.0.1:{quick}"], seconds=seconds, limit=1 << 20)
        first = asyncio.create_task(fetcher.fetch_all(at(f"http://127.0.0.1:{slow}/slow"), lambda _: None))
        async with asyncio.timeout(GUARD_SECONDS):
            await asked.wait()
            yield fetcher, slow, quick
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


def test_a_slow_host_keeps_nobody_waiting_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with one_slow_file(monkeypatch, seconds=10 * GUARD_SECONDS) as (fetcher, _, quick):
            url = f"http://127.0.0.1:{quick}/a"
            assert (await fetcher.fetch_all(at(url), lambda _: None))[url] == PNG

    asyncio.run(scene())


def test_a_file_has_its_whole_time_from_its_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epdctl.gateway.remote.PATIENCE", GUARD_SECONDS)

    async def scene() -> None:
        async with one_slow_file(monkeypatch, seconds=1) as (fetcher, slow, _):
            second = asyncio.create_task(fetcher.fetch_all(at(f"http://127.0.0.1:{slow}/slow"), lambda _: None))
            await asyncio.sleep(0)
            url = f"http://127.0.0.1:{slow}/a"  # has its turn when the time of both is over
            assert (await fetcher.fetch_all(at(url), lambda _: None))[url] == PNG
            await asyncio.gather(second, return_exceptions=True)

    asyncio.run(scene())


def test_whoever_gets_no_turn_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epdctl.gateway.remote.PATIENCE", 0)

    async def scene() -> None:
        async with one_slow_file(monkeypatch, seconds=10 * GUARD_SECONDS) as (fetcher, slow, _):
            with pytest.raises(RequestError, match=f"127.0.0.1:{slow} is slow") as caught:
                await fetcher.fetch_all(at(f"http://127.0.0.1:{slow}/a"), lambda _: None)
            assert (caught.value.status, caught.value.retry_after) == (429, 1)

    asyncio.run(scene())


def test_certificates_are_read_once_and_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[threading.Thread] = []
    make = ssl.create_default_context

    def making(**options: Any) -> ssl.SSLContext:
        readers.append(threading.current_thread())
        return make(**options)

    monkeypatch.setattr(ssl, "create_default_context", making)

    async def scene() -> None:
        async with serving(lambda _: ok()) as port:
            fetcher = Fetcher([f"127.0.0.1:{port}"], seconds=60, limit=1 << 20)
            for _ in range(2):
                places = at(f"http://127.0.0.1:{port}/a") | at(f"http://127.0.0.1:{port}/b")
                await fetcher.fetch_all(places, lambda _: None)

    asyncio.run(scene())
    assert len(readers) == 1
    assert readers[0] is not threading.main_thread()


def test_certificates_that_could_not_be_read_once_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    make, failures = ssl.create_default_context, [OSError(errno.EMFILE, "too many open files")]

    def making(**options: Any) -> ssl.SSLContext:
        if failures:
            raise failures.pop()
        return make(**options)

    monkeypatch.setattr(ssl, "create_default_context", making)

    async def scene() -> None:
        async with serving(lambda _: ok()) as port:
            fetcher = Fetcher([f"127.0.0.1:{port}"], seconds=60, limit=1 << 20)
            place = at(f"http://127.0.0.1:{port}/a")
            with pytest.raises(RequestError, match="too many open files"):
                await fetcher.fetch_all(place, lambda _: None)
            assert set(await fetcher.fetch_all(place, lambda _: None)) == set(place)

    asyncio.run(scene())


def test_what_comes_is_held_as_it_comes() -> None:
    async def scene() -> None:
        def full(_: int) -> None:
            raise RequestError(429, "full")

        async with serving(lambda _: ok()) as port:
            fetcher = Fetcher([f"127.0.0.1:{port}"], seconds=60, limit=1 << 20)
            with pytest.raises(RequestError) as caught:
                await fetcher.fetch_all(at(f"http://127.0.0.1:{port}/a"), full)
            assert caught.value.status == 429

    asyncio.run(scene())


# -- the key --

KEY = Secret("0123456789abcdef")


def test_a_key_is_shown_as_bearer() -> None:
    assert shows_key("Bearer 0123456789abcdef", KEY)
    assert shows_key("bearer  0123456789abcdef ", KEY)
    for wrong in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer 0123456789abcdeg",
        "0123456789abcdef",
        "Basic 0123456789abcdef",
        "Bearer ü",
    ):
        assert not shows_key(wrong, KEY), wrong


def test_a_key_is_used_and_never_printed() -> None:
    config = GatewayConfig(api_key=KEY)
    codec: Codec[GatewayConfig] = Codec(GatewayConfig)
    again = codec.decode(codec.encode(config))
    assert again.api_key is not None
    assert again.api_key.reveal() == "0123456789abcdef"
    for shown in (repr(config), str(config), f"{KEY} {KEY!r}", "%s" % KEY, to_json(config).decode()):  # noqa: UP031
        assert "0123456789abcdef" not in shown
        assert "***" in shown
    assert msgspec.structs.replace(config, port=1).api_key == KEY
