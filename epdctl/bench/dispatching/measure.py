"""Items through the router and through the baseline, in turns on one machine, medians of several rounds."""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from epdctl.bench.clusters import Say, await_ready, environment, running
from epdctl.bench.dispatching.plain import PlainClient
from epdctl.errors import EpdError
from epdctl.ids import Incarnation, Modality, RankName, RequestId, RunId, Stage
from epdctl.topology.plan import Deadlines, Plan, PlannedRank, RestartMode, RestartPolicy
from epdctl.wire.config import ModelConfig, RankConfig, RankSpec
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ROUTER_TO_CLIENT,
    ClientToRouter,
    Encode,
    Encoded,
    MediaItem,
    RouterToClient,
)
from epdctl.wire.sockets import Link
from epdctl.wire.transfer import Extent, PoolAddress, RemoteLease

__all__ = ["FRAME_BYTES", "INFLIGHT", "Report", "measure"]

FRAME_BYTES = 100 << 10
INFLIGHT = 64
TURN = 50  # items of one side before the other's; five times as many with INFLIGHT under way
ROUTER, RANK = RankName.of(Stage.ENCODER_ROUTER, 0), RankName.of(Stage.ENCODER, 0)


class Report(msgspec.Struct, frozen=True):
    """``ratio_p50``: one item at a time, ours over the baseline's; ``ratio_rate``: items per second with INFLIGHT of
    them under way, ours over the baseline's. Ratios are of the medians over the rounds.
    """

    schema: int
    ratio_p50: float
    ratio_rate: float
    base_p50_us: float
    base_rate: float
    p50_us: float
    rate: float
    rounds: int
    items: int
    cpus: int
    python: str


class Client(Protocol):
    async def item(self, media: bytes) -> None:
        """One item, there and back."""
        ...


class RouterClient:
    """Speaks to the router as a gateway does."""

    def __init__(self, endpoint: str) -> None:
        self._link: Link[RouterToClient, ClientToRouter] = Link(
            endpoint, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, self._answered
        )
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._number = 0
        address = PoolAddress(
            owner=RankName("prefill/0"), incarnation=Incarnation(1), pool="embeddings", backend="zmq", endpoint="none"
        )
        self._slot = RemoteLease(pool=address, lease=1, generation=1, extents=[Extent(offset=0, nbytes=4)])

    def _answered(self, message: RouterToClient, _: list[memoryview]) -> None:
        if not isinstance(message, Encoded):
            raise EpdError(f"an item failed: {message}")
        self._waiting.pop(message.index).set_result(None)

    async def item(self, media: bytes) -> None:
        self._number += 1
        number = self._number
        item = MediaItem(
            index=number, modality=Modality.IMAGE, content_hash=f"{number:032x}", of=1, grid=[1, 2, 2], rows=1
        )
        message = Encode(
            request=RequestId(f"r{number}"), attempt=0, item=item, slot=self._slot, notify="none", budget_s=60.0
        )
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._link.send(message, [media])
        await future

    def close(self) -> None:
        self._link.close()


def measure(rounds: int, items: int, say: Say) -> Report:
    """``items`` of each round, in whole turns, one at a time; five times as many with INFLIGHT under way."""
    with tempfile.TemporaryDirectory(prefix="epdctl-bench-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)
        endpoint = stack.enter_context(_product(folder))
        front = stack.enter_context(_baseline(folder))
        return asyncio.run(_rounds((front, endpoint), rounds, items, say))


async def _rounds(ends: tuple[str, str], rounds: int, items: int, say: Say) -> Report:
    base, ours = PlainClient(ends[0]), RouterClient(ends[1])
    try:
        seen = []
        for client in (base, ours):
            await _seconds(client, 5 * TURN)  # connections, first allocations
        for number in range(rounds):
            seen.append(await _round(base, ours, items))
            say(f"round {number + 1}: p50 {seen[-1][0]:.0f} and {seen[-1][1]:.0f} µs")
    finally:
        base.close()
        ours.close()
    base_p50, p50, base_rate, rate = (statistics.median(column) for column in zip(*seen, strict=True))
    return Report(
        schema=1,
        ratio_p50=round(p50 / base_p50, 3),
        ratio_rate=round(rate / base_rate, 3),
        base_p50_us=round(base_p50, 1),
        base_rate=round(base_rate, 1),
        p50_us=round(p50, 1),
        rate=round(rate, 1),
        rounds=rounds,
        items=items,
        cpus=os.cpu_count() or 1,
        python=platform.python_version(),
    )


async def _round(base: Client, ours: Client, items: int) -> tuple[float, float, float, float]:
    """Baseline and ours, p50 in microseconds; then items per second. In short turns, so that whatever else the machine
    does meets both.
    """
    alone: tuple[list[float], list[float]] = ([], [])
    together = [0.0, 0.0]
    turns = max(1, items // TURN)
    for _ in range(turns):
        for times, client in zip(alone, (base, ours), strict=True):
            times.extend(await _one_by_one(client, TURN))
    for _ in range(turns):
        for index, client in enumerate((base, ours)):
            together[index] += await _seconds(client, 5 * TURN)
    p50s = [statistics.median(times) * 1e6 for times in alone]
    rates = [turns * 5 * TURN / seconds for seconds in together]
    return p50s[0], p50s[1], rates[0], rates[1]


async def _one_by_one(client: Client, items: int) -> list[float]:
    """Seconds of each."""
    media = bytes(FRAME_BYTES)
    times = []
    for _ in range(items):
        began = time.perf_counter()
        await client.item(media)
        times.append(time.perf_counter() - began)
    return times


async def _seconds(client: Client, items: int) -> float:
    """Of all ``items``, INFLIGHT at any time."""
    media = bytes(FRAME_BYTES)
    left = iter(range(items))

    async def work() -> None:
        for _ in left:
            await client.item(media)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(INFLIGHT)))
    return time.perf_counter() - began


@contextmanager
def _product(folder: Path) -> Generator[str]:
    """The router and an echo rank under a real daemon; where the router listens."""
    environ = environment(folder)
    services = {ROUTER: "epdctl.encoder.router:RouterService", RANK: "epdctl.bench.dispatching.echo:Echo"}
    plan = Plan(
        cluster="bench",
        source="(bench dispatch)",
        adapter="bench",
        ranks=tuple(_rank(name, service, environ) for name, service in services.items()),
        restart=RestartPolicy(mode=RestartMode.NEVER),
        deadlines=Deadlines(),
    )
    with running(plan, environ) as daemon:
        await_ready(daemon.cluster.client)
        sockets = daemon.cluster.directory.sockets
        spec = RankSpec(
            run=RunId("0"),
            cluster="bench",
            incarnation=Incarnation(1),
            token="",
            supervisor="",
            sockets=str(sockets),
            config=plan.ranks[0].config,
        )
        yield spec.endpoint("inbox")


def _rank(name: RankName, service: str, environ: dict[str, str]) -> PlannedRank:
    config = RankConfig(
        rank=name, stage=name.stage, service=service, model=ModelConfig(path="/", name="none", family="none")
    )
    return PlannedRank(config=config, argv=(sys.executable, "-m", "epdctl.rank"), env=environ)


@contextmanager
def _baseline(folder: Path) -> Generator[str]:
    """Its two processes; where the first one listens. Each in a session of its own, as ranks are: Linux shares cores
    between sessions first, and on a busy machine those of one session wake each other sooner.
    """
    front, back = f"ipc://{folder}/front", f"ipc://{folder}/back"
    module = [sys.executable, "-m", "epdctl.bench.dispatching.baseline"]
    processes = [
        subprocess.Popen([*module, *words], start_new_session=True)
        for words in (["proxy", front, back], ["echo", back])
    ]
    try:
        yield front
    finally:
        for process in processes:
            process.kill()
            process.wait()
