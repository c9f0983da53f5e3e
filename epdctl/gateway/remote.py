"""Media from http(s) addresses, for the hosts that the topology names and no others.

The address is checked after the name is resolved, and the connection goes to the checked address: a name that answers
differently the second time gains nothing. Every hop of a redirect is checked as the first one was.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from epdctl.errors import RequestError
from epdctl.gateway.budget import RETRY_AFTER
from epdctl.rank.media import Source, invalid

__all__ = ["Fetcher", "Target", "is_reachable_for_all", "is_remote", "target_of"]

MAX_REDIRECTS = 3
PORTS: Mapping[str, int] = {"http": 80, "https": 443}
AT_ONCE = 8  # downloads of one gateway from one host
PATIENCE = 2  # times the seconds of one file, for a turn: those before it come or are given up meanwhile

Hold = Callable[[int], None]  # so many bytes have come; raises RequestError when they do not fit
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


def is_remote(url: str) -> bool:
    return url[:8].lower().startswith(("http:", "https:"))


@dataclass(frozen=True, slots=True)
class Target:
    """One hop: where it goes by name. ``literal``: the host is an address, which the topology names as such."""

    url: httpx.URL
    host: str
    port: int
    literal: bool


def target_of(url: str, hosts: Iterable[str]) -> Target:
    """Raises ValueError with the reason for an address that the topology does not allow.

    ``hosts``: ``name`` stands for the scheme's own port, ``name:port`` for that one.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"not an address: {error}") from error
    if parsed.scheme not in PORTS or not parsed.host:
        raise ValueError(f"only http and https addresses with a host are fetched, not {parsed.scheme}")
    if parsed.userinfo:
        raise ValueError("an address with a user name or password is not fetched")
    own = PORTS[parsed.scheme]
    port = parsed.port or own
    names = {f"{parsed.host}:{port}"} | ({parsed.host} if port == own else set())
    if names.isdisjoint(host.lower() for host in hosts):
        raise ValueError(f"media are not fetched from {parsed.host}:{port}: it is not in gateway.media_hosts")
    return Target(parsed, parsed.host, port, _as_address(parsed.host) is not None)


# Global unicast, and what IANA's registries of special addresses set aside in it: of IPv6 nothing else is public, and
# so no IPv4 address that is wrapped in one.
PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
SPECIAL = tuple(
    map(
        ipaddress.ip_network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "192.0.0.0/24", "192.88.99.0/24")
    )
)


def is_reachable_for_all(address: str) -> bool:
    """An address of the public internet: no loopback, private, link-local or shared range, however it is wrapped."""
    found = _as_address(address)
    if found is None or any(found in network for network in SPECIAL):
        return False
    if isinstance(found, ipaddress.IPv6Address) and found not in PUBLIC_IPV6:
        return False
    return found.is_global and not found.is_multicast


def _as_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Fetcher:
    """Holds no connection between two files. ``seconds`` is for one file with all its redirects, from its turn on:
    each host has turns of its own, and one that is slow keeps nobody waiting for another."""

    def __init__(self, hosts: Sequence[str], *, seconds: float, limit: int, resolve: Resolve = _resolve) -> None:
        self._hosts = tuple(hosts)
        self._seconds = seconds
        self._limit = limit
        self._resolve = resolve
        self._turns: dict[str, asyncio.Semaphore] = {}  # by host: no more than the topology names
        self._trusted: asyncio.Future[ssl.SSLContext] | None = None

    async def fetch_all(self, wanted: Mapping[str, Source], hold: Hold) -> dict[str, bytes]:
        """``wanted``: by URL. Raises RequestError (400, and what ``hold`` raises)."""
        came = 0

        def count(more: int) -> None:
            nonlocal came
            came += more
            hold(came)

        tasks = {url: asyncio.create_task(self._fetch(source, count)) for url, source in wanted.items()}
        try:
            return {url: await task for url, task in tasks.items()}
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _fetch(self, source: Source, count: Hold) -> bytes:
        noun = source.modality.noun
        try:
            target = target_of(source.text, self._hosts)
            async with self._turn(f"{target.host}:{target.port}"), asyncio.timeout(self._seconds):
                return await self._follow(source, count)
        except TimeoutError as error:
            raise invalid(source, f"the {noun} did not come within {self._seconds:g} s") from error
        except ValueError as error:
            raise invalid(source, str(error)) from error
        except (httpx.HTTPError, OSError) as error:
            raise invalid(source, f"the {noun} cannot be fetched: {str(error) or type(error).__name__}") from error

    @asynccontextmanager
    async def _turn(self, host: str) -> AsyncIterator[None]:
        """Raises RequestError (429): whoever waits is not to blame for what is slow."""
        turns = self._turns.setdefault(host, asyncio.Semaphore(AT_ONCE))
        try:
            async with asyncio.timeout(PATIENCE * self._seconds):
                await turns.acquire()
        except TimeoutError as error:
            text = f"{host} is slow: {AT_ONCE} files are under way from there, and more wait"
            raise RequestError(429, text, code="full", retry_after=RETRY_AFTER) from error
        try:
            yield
        finally:
            turns.release()

    async def _roots(self) -> ssl.SSLContext:
        """Whose certificates are trusted: read once and beside the loop, which it would hold up."""
        if self._trusted is None or (self._trusted.done() and self._trusted.exception() is not None):
            self._trusted = asyncio.ensure_future(asyncio.to_thread(httpx.create_ssl_context, trust_env=False))
        return await asyncio.shield(self._trusted)

    async def _follow(self, source: Source, count: Hold) -> bytes:
        url, accept = source.text, f"{source.modality}/*"
        roots = await self._roots()
        async with httpx.AsyncClient(
            trust_env=False, follow_redirects=False, timeout=self._seconds, verify=roots
        ) as client:
            for _ in range(MAX_REDIRECTS + 1):
                request = await self._request(client, target_of(url, self._hosts), accept)
                response = await client.send(request, stream=True)
                try:
                    if not response.has_redirect_location:  # a 3xx without an address leads nowhere
                        return await self._read(response, count)
                    url = str(httpx.URL(url).join(response.headers["location"]))
                finally:
                    await response.aclose()
        raise ValueError(f"more than {MAX_REDIRECTS} redirects")

    async def _request(self, client: httpx.AsyncClient, target: Target, accept: str) -> httpx.Request:
        """To the checked address, under the name that certificates and virtual hosts know."""
        address = target.host if target.literal else await self._checked_address(target)
        return client.build_request(
            "GET",
            target.url.copy_with(host=address),
            headers={"host": target.url.netloc.decode("ascii"), "accept": accept, "accept-encoding": "identity"},
            extensions={"sni_hostname": target.host},
        )

    async def _checked_address(self, target: Target) -> str:
        addresses = await self._resolve(target.host, target.port)
        for address in addresses:
            if not is_reachable_for_all(address):
                raise ValueError(f"{target.host} is {address}, which is not an address of the public internet")
        if not addresses:
            raise ValueError(f"{target.host} has no address")
        return addresses[0]

    async def _read(self, response: httpx.Response, count: Hold) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"{response.url.path} was answered with HTTP {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("the file came compressed, which nobody asked for")
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > self._limit:
                raise ValueError(f"the file is larger than {self._limit} bytes")
            count(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)
