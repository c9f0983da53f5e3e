"""Specs, peers and a guarded event loop for tests of ranks, with real sockets in a short directory."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from epdctl.ids import Incarnation, RankName, RunId
from epdctl.wire.config import ModelConfig, RankConfig, RankSpec
from epdctl.wire.lifecycle import Endpoints, Peer

T = TypeVar("T")
GUARD_SECONDS = 60.0  # against hanging only: no test waits for time to pass


@contextmanager
def socket_directory() -> Iterator[Path]:
    """Short enough for a unix socket's path, whatever the test's own folder is called."""
    directory = Path(tempfile.mkdtemp(prefix="epd-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def run(work: Coroutine[Any, Any, T], *, unhandled: list[BaseException] | None = None) -> T:
    """Run ``work``; an error that nobody handled fails the test, unless ``unhandled`` collects it."""
    seen: list[BaseException] = [] if unhandled is None else unhandled

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        seen.append(context.get("exception") or RuntimeError(context["message"]))

    async def guarded() -> T:
        asyncio.get_running_loop().set_exception_handler(note)
        async with asyncio.timeout(GUARD_SECONDS):
            return await work

    result = asyncio.run(guarded())
    if unhandled is None and seen:
        raise seen[0]
    return result


class News:
    """That something has changed, and a way to wait for a fact without spinning: a loop that spins takes the
    interpreter from an engine at work."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def tell(self) -> None:
        self._changed.set()

    async def until(self, fact: Callable[[], bool]) -> None:
        async with asyncio.timeout(GUARD_SECONDS):
            while not fact():
                self._changed.clear()
                await self._changed.wait()


class Facts:
    """Values that callbacks saw, and a way to wait until enough of them came."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._news = News()

    def add(self, value: Any) -> None:
        self.seen.append(value)
        self._news.tell()

    async def until(self, enough: Callable[[list[Any]], bool]) -> list[Any]:
        await self._news.until(lambda: enough(self.seen))
        return self.seen

    async def count(self, number: int) -> list[Any]:
        return await self.until(lambda seen: len(seen) >= number)


MODEL = ModelConfig(path="/nowhere", name="tiny", family="qwen2_5_vl")


def make_spec(rank: str, sockets: Path, *, incarnation: int = 1, **config: Any) -> RankSpec:
    name = RankName(rank)
    settings: dict[str, Any] = {"model": MODEL, "service": "nowhere:nothing", **config}
    return RankSpec(
        run=RunId("00ff"),
        cluster="test",
        incarnation=Incarnation(incarnation),
        token="secret",
        supervisor=str(sockets / "ranks.sock"),
        sockets=str(sockets),
        config=RankConfig(rank=name, stage=name.stage, **settings),
    )


def make_peer(rank: str, endpoints: Endpoints = Endpoints(), incarnation: int = 1) -> Peer:  # noqa: B008
    name = RankName(rank)
    return Peer(rank=name, stage=name.stage, incarnation=Incarnation(incarnation), endpoints=endpoints)
