"""Real encoder ranks and their router under a real daemon, killed, stopped and stuck at work: nothing is lost.

The ranks' tower makes values of bytes; all that is around it is a real rank's. The test is the client, and owns the
slots.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from epdctl.ids import Incarnation, Modality, RankName, RequestId
from epdctl.topology.plan import Deadlines, Plan, PlannedRank, RestartPolicy
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.landing import Owner
from epdctl.transfer.leases import Lease
from epdctl.transfer.pool import Pool
from epdctl.transfer.zmq import ZmqTransport
from epdctl.wire.config import EncoderConfig, Limits, ModelConfig, RankConfig
from epdctl.wire.control import RankState, RankStatus
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ENCODER_TO_LANGUAGE,
    ROUTER_TO_CLIENT,
    ClientToRouter,
    EmbeddingLanded,
    Encode,
    Encoded,
    EncodeFailed,
    FailureKind,
    MediaItem,
    RankRef,
    RouterToClient,
    Sized,
)
from epdctl.wire.sockets import Inbox, Link
from tests.support.leaks import marked_processes
from tests.support.light_encoder import WIDTH, value
from tests.support.ranks import socket_directory
from tests.support.scripted import Cluster, start

ROOT = Path(__file__).resolve().parents[2]
SECRET = "the owner of the slots"
LIGHT = "tests.support.light_encoder:LightEncoder"
ROWS = 3
SILENCE = Deadlines(start=60.0, heartbeat=0.05, unhealthy=0.75, dead=1.5, stuck=60.0, drain=5.0, kill=5.0)
SMALL = Limits(inflight=8, queue=32)  # of the router and of every rank alike
AGAIN = RestartPolicy(initial=0.01, maximum=0.05, budget=1000)


def plan_of(encoders: dict[str, str], deadlines: Deadlines, limits: Limits) -> Plan:
    """A router, and encoders by name with what each runs."""

    def planned(name: str, service: str) -> PlannedRank:
        rank = RankName(name)
        config = RankConfig(
            rank=rank,
            stage=rank.stage,
            service=service,
            model=ModelConfig(path="/nowhere", name=SECRET, family="qwen2_5_vl"),
            limits=limits,
            encoder=EncoderConfig(cache_bytes=1 << 20, ranks=len(encoders)),
            heartbeat_seconds=deadlines.heartbeat,
        )
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return PlannedRank(config=config, argv=(sys.executable, "-m", "epdctl.rank"), env=env)

    services = {"encoder-router/0": "epdctl.encoder.router:RouterService", **encoders}
    ranks = tuple(planned(name, service) for name, service in services.items())
    return Plan(
        cluster="encoders", source="test.yaml", adapter="native", ranks=ranks, restart=AGAIN, deadlines=deadlines
    )


Begin = Callable[..., Cluster]


@pytest.fixture
def up(place: dict[str, str], tmp_path: Path) -> Iterator[Begin]:
    clusters: list[Cluster] = []

    def begin(
        encoders: dict[str, str] | None = None,
        deadlines: Deadlines = SILENCE,
        limits: Limits = Limits(),  # noqa: B008
    ) -> Cluster:
        services = {"encoder/0": LIGHT, "encoder/1": LIGHT} if encoders is None else encoders
        clusters.append(start(plan_of(services, deadlines, limits), place, tmp_path))
        return clusters[-1]

    yield begin
    for cluster in clusters:
        cluster.stop()
    assert marked_processes(place) == []  # descriptors are not compared: zmq closes its own when it comes to it


@dataclass
class Try:
    """One attempt of one item, until it has ended."""

    media: bytes
    lease: Lease
    ended: asyncio.Future[Encoded | EncodeFailed]


@dataclass
class Client:
    """Sends items, owns their slots, and keeps account of every answer."""

    router: str
    sockets: Path
    tries: dict[tuple[str, int, int], Try] = field(default_factory=dict)
    answers: Counter[tuple[str, int, int]] = field(default_factory=Counter)
    landed: set[tuple[str, int, int]] = field(default_factory=set)
    lost: list[EncodeFailed] = field(default_factory=list)
    strange: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        owner = Owner(RankName("prefill/0"), Incarnation(1), SECRET)
        self.transport = ZmqTransport(f"ipc://{self.sockets}/transfer", owner)
        self.pool = Pool("embeddings", torch.empty(1 << 20, dtype=torch.uint8), RangeAllocator(1 << 20))
        self.address = self.transport.register(self.pool)
        self.inbox: Inbox[EmbeddingLanded] = Inbox(
            f"ipc://{self.sockets}/inbox", ENCODER_TO_LANGUAGE, lambda _, message, __: self._landed(message)
        )
        self.link: Link[RouterToClient, ClientToRouter] = Link(
            self.router, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, lambda message, _: self._answered(message)
        )

    def _landed(self, message: EmbeddingLanded) -> None:
        """Bytes of an earlier lease were refused at the door; a rank that was killed may have said so twice."""
        self.landed.add((message.request, message.attempt, message.index))

    def _answered(self, message: RouterToClient) -> None:
        assert not isinstance(message, Sized), "it has a slot"
        name = (str(message.request), message.attempt, message.index)
        self.answers[name] += 1
        if name in self.tries and not self.tries[name].ended.done():
            self.tries[name].ended.set_result(message)
        else:
            self.strange.append(message)

    async def attempt(self, request: str, index: int, attempt: int, media: bytes) -> Encoded | EncodeFailed:
        lease = self.pool.lease(ROWS * WIDTH, request, seconds=600)
        mine = Try(media, lease, asyncio.get_running_loop().create_future())
        self.tries[request, attempt, index] = mine
        content = hashlib.blake2b(media, digest_size=16).hexdigest()
        item = MediaItem(index=index, modality=Modality.IMAGE, content_hash=content, of=1, grid=[1, 2, 2], rows=ROWS)
        job = Encode(
            request=RequestId(request),
            attempt=attempt,
            item=item,
            slot=lease.remote(self.address),
            notify=self.inbox.endpoint,
            budget_s=60.0,
        )
        self.link.send(job, [media])
        try:
            end = await mine.ended
            if isinstance(end, Encoded):
                extent = lease.extents[0]
                got = bytes(self.pool.memory[extent.offset : extent.offset + ROWS * WIDTH].numpy())
                assert got == value(media, ROWS), f"{request} item {index} got another's embedding"
            return end
        finally:
            self.pool.release(lease.id)

    async def deliver(self, number: int) -> int:
        """Try until it is delivered, as the gateway does when a rank is lost; returns the number of tries. Every third
        picture comes three times."""
        media = f"picture {number if number % 3 else number // 9}".encode().ljust(500, b".")
        for attempt in range(1, 20):
            end = await self.attempt(f"request {number}", 0, attempt, media)
            if isinstance(end, Encoded):
                return attempt
            assert end.kind is FailureKind.RANK_LOST, end
            self.lost.append(end)
        raise AssertionError(f"item {number} was lost 19 times")

    async def close(self) -> None:
        self.link.close()
        self.inbox.close()
        await self.transport.close()


@asynccontextmanager
async def client_of(router: str) -> AsyncIterator[Client]:
    with socket_directory() as sockets:
        client = Client(router, sockets)
        try:
            yield client
        finally:
            await client.close()


def with_client(cluster: Cluster, test: Callable[[Client], Coroutine[Any, Any, None]], seconds: float = 100) -> None:
    router = cluster.until_rank("encoder-router/0", RankState.READY).endpoints.inbox
    assert router is not None

    async def work(router: str) -> None:
        async with asyncio.timeout(seconds), client_of(router) as client:
            await test(client)

    asyncio.run(work(router))


# --- holes -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_dies_before_it_connects_holds_nobody_up_and_comes_again(up: Begin) -> None:
    cluster = up({"encoder/0": "tests.support.light_encoder:SecondLifeOnly", "encoder/1": LIGHT})

    async def test(client: Client) -> None:
        await asyncio.to_thread(cluster.until_rank, "encoder/1", RankState.READY)
        assert await asyncio.gather(*(client.deliver(number) for number in range(8))) == [1] * 8
        again = await asyncio.to_thread(cluster.until_rank, "encoder/0", RankState.READY, 2)
        assert "before it connected" in again.reason

    with_client(cluster, test)
    exits = [event.text for event in cluster.events("exit") if event.rank == "encoder/0"]
    assert exits, "the first life of encoder/0 was not seen to end"
    assert "status 0" not in exits[0], "a crash must not look like a clean end"


def test_a_rank_with_a_stuck_kernel_beats_is_found_and_its_item_goes_to_another(up: Begin) -> None:
    cluster = up(deadlines=Deadlines(heartbeat=0.05, unhealthy=60.0, dead=90.0, stuck=0.5, drain=1.0, kill=5.0))
    cluster.until_ready()

    async def test(client: Client) -> None:
        end = await client.attempt("hangs", 0, 1, b"hang")  # on both ranks, one after the other
        assert isinstance(end, EncodeFailed)
        assert end.kind is FailureKind.RANK_LOST
        assert "lost with encoder/0, encoder/1" in end.text
        for rank in ("encoder/0", "encoder/1"):
            again = await asyncio.to_thread(cluster.until_rank, rank, RankState.READY, 2)
            assert "its work has stood still for" in again.reason
        assert await asyncio.gather(*(client.deliver(number) for number in range(8))) == [1] * 8

    with_client(cluster, test)


def test_health_answers_at_once_while_ranks_load_and_names_them(up: Begin) -> None:
    cluster = up({"encoder/0": LIGHT, "encoder/1": "tests.support.fake_services:NeverReady"})
    cluster.until_rank("encoder/0", RankState.READY)
    cluster.until_rank("encoder-router/0", RankState.READY)
    cluster.until(lambda status: any("loading weights" in rank.reason for rank in status.ranks))
    reply = cluster.client.health()
    assert reply.verdict == "degraded", "one of two serves"
    assert [problem.rank for problem in reply.problems] == ["encoder/1"]
    assert "loading weights 1/3" in reply.problems[0].text


def test_a_burst_against_small_queues_ends_for_every_picture_in_its_embedding_or_a_refusal(up: Begin) -> None:
    cluster = up(limits=SMALL)
    cluster.until_ready()

    async def test(client: Client) -> None:
        tries = [
            client.attempt(f"request {number}", index, 1, f"picture {number} {index}".encode().ljust(500, b"."))
            for number in range(200)
            for index in range(4)
        ]
        ends = await asyncio.gather(*tries)
        kinds = Counter(end.kind if isinstance(end, EncodeFailed) else "encoded" for end in ends)
        assert set(kinds) == {"encoded", FailureKind.FULL}
        assert kinds["encoded"] + kinds[FailureKind.FULL] == 800
        assert kinds["encoded"] >= 2 * 8 + 32, "what there was room for was encoded"
        assert set(client.answers.values()) == {1}
        assert client.strange == []

    with_client(cluster, test)
    idle = cluster.until(lambda status: all(rank.inflight == 0 for rank in status.ranks))
    done = {str(rank.rank): rank.completed for rank in idle.ranks}
    assert done["encoder-router/0"] == 800


# --- chaos -----------------------------------------------------------------------------------------------------------


class Blow(enum.Enum):
    KILL = "SIGKILL"
    STOP = "SIGSTOP, until the daemon kills it"
    PAUSE = "SIGSTOP, and SIGCONT when it has been given up: it writes late, to slots that are others' by then"


@dataclass(frozen=True)
class Order:
    at: int  # when so many were delivered
    rank: str
    blow: Blow


def orders_of(blows: dict[Blow, int], items: int) -> list[Order]:
    """Drawn once, the same in every run."""
    draw = random.Random(20)
    each = [blow for blow, count in blows.items() for _ in range(count)]
    draw.shuffle(each)
    times = sorted(draw.sample(range(10, items - 60), len(each)))
    return [Order(at, draw.choice(["encoder/0", "encoder/1"]), blow) for at, blow in zip(times, each, strict=True)]


@contextmanager
def enough_time(seconds: int) -> Iterator[None]:
    signal.alarm(seconds)
    yield
    signal.alarm(0)


class Chaos:
    """A window of items under way at any time; signals fall when so many were delivered and their target is up."""

    WINDOW = 48

    def __init__(self, cluster: Cluster, client: Client, items: int) -> None:
        self.cluster = cluster
        self.client = client
        self.items = items
        self.begun = 0
        self.delivered = 0
        self.tries: list[int] = []
        self.gate = 0  # items that may have begun
        self.struck: set[RankRef] = set()
        self.ended: set[RankRef] = set()  # of them: by a blow that they do not get over
        self.changed = asyncio.Condition()

    async def worker(self) -> None:
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: self.begun < self.gate or self.begun >= self.items)
                if self.begun >= self.items:
                    return
                number = self.begun
                self.begun += 1
            tries = await self.client.deliver(number)
            async with self.changed:
                self.delivered += 1
                self.tries.append(tries)
                self.changed.notify_all()

    async def until(self, fact: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(fact)

    async def open_gate(self, to: int) -> None:
        async with self.changed:
            self.gate = max(self.gate, to)
            self.changed.notify_all()

    async def strike(self, order: Order) -> None:
        victim = await asyncio.to_thread(self.victim, order.rank)
        await self.open_gate(order.at + self.WINDOW)
        await self.until(lambda: self.delivered >= min(order.at, self.items - 1))
        assert victim.pid is not None
        who = RankRef(rank=victim.rank, incarnation=victim.incarnation)
        self.struck.add(who)
        if order.blow is not Blow.PAUSE:
            self.ended.add(who)
        os.kill(victim.pid, signal.SIGKILL if order.blow is Blow.KILL else signal.SIGSTOP)
        if order.blow is Blow.PAUSE:
            await asyncio.to_thread(self.cluster.until_rank, order.rank, RankState.UNHEALTHY, victim.incarnation)
            os.kill(victim.pid, signal.SIGCONT)
            await asyncio.to_thread(self.cluster.until_rank, order.rank, RankState.READY, victim.incarnation)

    def victim(self, rank: str) -> RankStatus:
        """``rank``, ready, and in no incarnation that was struck down before: news of that may take a moment."""

        def fit(found: RankStatus) -> bool:
            ended = RankRef(rank=found.rank, incarnation=found.incarnation) in self.ended
            return found.rank == rank and found.state is RankState.READY and not ended

        status = self.cluster.until(lambda status: any(map(fit, status.ranks)))
        (victim,) = filter(fit, status.ranks)
        return victim

    async def run(self, orders: list[Order]) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.WINDOW):
                group.create_task(self.worker())
            for order in orders:
                await self.strike(order)
            await self.open_gate(self.items)


def test_killed_stopped_and_paused_at_random_times_every_item_is_delivered_once_with_its_own_value(up: Begin) -> None:
    blows, items = {Blow.KILL: 10, Blow.STOP: 5, Blow.PAUSE: 5}, 1000
    cluster = up(deadlines=replace(SILENCE, dead=6.0), limits=Limits(inflight=8, queue=64))
    cluster.until_ready()

    async def test(client: Client) -> None:
        chaos = Chaos(cluster, client, items)
        await chaos.run(orders_of(blows, items))
        assert len(chaos.tries) == chaos.delivered == items
        good = Counter(name[0] for name, mine in client.tries.items() if isinstance(mine.ended.result(), Encoded))
        assert good == Counter(f"request {number}" for number in range(items)), "delivered exactly once"
        assert set(client.answers.values()) == {1}, "no attempt was answered twice"
        assert client.strange == []
        assert len(client.pool.leases) == 0
        for end in client.lost:
            assert chaos.struck.issuperset(end.lost), f"lost with a rank that was left alone: {end.text}"
            assert {who.rank for who in end.lost} == {"encoder/0", "encoder/1"}, f"not tried everywhere: {end.text}"
        assert sum(chaos.tries) == items + len(client.lost)
        assert chaos.tries.count(1) > 0.95 * items

    with enough_time(600):
        with_client(cluster, test, seconds=600)
    status = cluster.until_ready()
    restarts = {str(rank.rank): rank.restarts for rank in status.ranks}
    assert restarts["encoder-router/0"] == 0
    assert restarts["encoder/0"] + restarts["encoder/1"] == blows[Blow.KILL] + blows[Blow.STOP]
