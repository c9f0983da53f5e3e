"""The rank that wants pictures encoded: it owns the slots, keeps so many items in flight, and counts what lands."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import statistics
import time
from collections.abc import Sequence

import torch

from epdctl.bench.encoding.orders import Orders, Outcome, Phase, report
from epdctl.bench.encoding.pictures import commented, picture
from epdctl.bench.encoding.rank import DECODED
from epdctl.errors import EpdError
from epdctl.ids import Modality, RequestId, Stage
from epdctl.rank.peers import PeerTable
from epdctl.rank.service import Progress, Pulse
from epdctl.rank.tasks import Tasks
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.open import open_transport
from epdctl.transfer.pool import Pool
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ENCODER_TO_LANGUAGE,
    ROUTER_TO_CLIENT,
    ClientToRouter,
    EmbeddingLanded,
    Encode,
    EncodeFailed,
    MediaItem,
    RouterToClient,
)
from epdctl.wire.lifecycle import Endpoints, Peer
from epdctl.wire.sockets import Inbox, Link

__all__ = ["Load"]

UNIT = 28  # pixels of one embedding's side
PICTURES = 32  # different ones of a size; each is sent with a comment of its own, so that no two are the same bytes
CHECKED = 16  # one landing in so many is held against the first of its picture
NEAR = 0.1  # relative difference that batching may make in 16 bits
LONGEST = 300.0  # seconds that one item may take


class Load:
    """Implements Service."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec
        self._orders = Orders.read()
        self._peers = PeerTable()
        self._tasks = Tasks()
        self._numbers = itertools.count()
        self._landed: dict[int, asyncio.Future[EmbeddingLanded]] = {}
        self._first: dict[tuple[int, int], torch.Tensor] = {}
        self._link: Link[RouterToClient, ClientToRouter] | None = None
        self._times: list[float] = []
        self._checked = 0

    async def start(self, progress: Progress) -> Endpoints:
        largest = max(phase.inflight * self._nbytes(phase.side) for phase in self._orders.phases)
        room = 2 * largest + (1 << 20)
        self._transport = open_transport(self._spec.config.transfer, self._spec)
        self._pool = Pool("embeddings", torch.empty(room, dtype=torch.uint8), RangeAllocator(room))
        self._address = self._transport.register(self._pool)
        self._inbox: Inbox[EmbeddingLanded] = Inbox(
            self._spec.endpoint("inbox"), ENCODER_TO_LANGUAGE, lambda _, message, __: self._arrived(message)
        )
        return Endpoints(inbox=self._inbox.endpoint, transfer=self._transport.endpoint)

    def _rows(self, side: int) -> int:
        return (side // UNIT) ** 2

    def _nbytes(self, side: int) -> int:
        row = self._orders.row
        return self._rows(side) * row.width * row.itemsize

    def _arrived(self, message: EmbeddingLanded) -> None:
        self._landed[message.index].set_result(message)

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._peers.replace(peers)
        routers = self._peers.of(Stage.ENCODER_ROUTER)
        if self._link is None and routers and len(self._peers.of(Stage.ENCODER)) == self._orders.encoders:
            assert routers[0].endpoints.inbox is not None
            self._link = Link(routers[0].endpoints.inbox, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, self._answered)
            self._tasks.start(self._work(), "load")

    def _answered(self, message: RouterToClient, _: list[memoryview]) -> None:
        if isinstance(message, EncodeFailed):
            raise EpdError(f"an item failed: {message.kind}, {message.text}")

    async def _work(self) -> None:
        outcomes = [await self._phase(phase) for phase in self._orders.phases]
        report(outcomes, self._spec.rank)

    async def _phase(self, phase: Phase) -> Outcome:
        pictures = await asyncio.gather(*(asyncio.to_thread(picture, seed, phase.side) for seed in range(PICTURES)))
        self._times, self._checked = [], 0
        end = time.monotonic() + phase.warm + phase.seconds
        async with asyncio.TaskGroup() as group:
            for client in range(phase.inflight):
                group.create_task(self._client(phase, client, pictures, end))
        times = self._times
        return Outcome(
            name=phase.name,
            pictures=len(times),
            seconds=phase.seconds,
            p50_ms=round(statistics.median(times) * 1000, 2) if times else 0.0,
            p99_ms=round(sorted(times)[int(len(times) * 0.99)] * 1000, 2) if times else 0.0,
            checked=self._checked,
        )

    async def _client(self, phase: Phase, client: int, pictures: Sequence[bytes], end: float) -> None:
        for seed in itertools.count(client):
            began = time.monotonic()
            if began >= end:
                return
            which = seed % len(pictures)
            await self._encode(phase, which, DECODED if phase.decoded else pictures[which])
            now = time.monotonic()
            if end - phase.seconds <= now < end:
                self._times.append(now - began)

    async def _encode(self, phase: Phase, which: int, media: bytes) -> None:
        number = next(self._numbers)
        name = f"{self._spec.rank}-{number}"
        if media != DECODED:
            media = commented(media, name.encode())
        lease = self._pool.lease(self._nbytes(phase.side), "load", seconds=LONGEST)
        landed = self._landed[number] = asyncio.get_running_loop().create_future()
        side = phase.side // UNIT * 2
        item = MediaItem(
            index=number,
            modality=Modality.IMAGE,
            content_hash=hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),
            of=1,
            grid=[1, side, side],
            rows=self._rows(phase.side),
        )
        message = Encode(
            request=RequestId(name),
            attempt=0,
            item=item,
            slot=lease.remote(self._address),
            notify=self._inbox.endpoint,
            budget_s=LONGEST,
        )
        assert self._link is not None
        self._link.send(message, [media])
        found = await landed
        del self._landed[number]
        self._pool.filled(found.lease, found.generation)
        if number % CHECKED == 0 and not phase.decoded:
            self._check(self._pool.tensor(lease, found.spec), (phase.side, which))
        self._pool.release(lease.id)

    def _check(self, embedding: torch.Tensor, which: tuple[int, int]) -> None:
        """The same picture has the same embedding, whatever batch it was in."""
        self._checked += 1
        first = self._first.setdefault(which, embedding.float().clone())
        difference = float((embedding.float() - first).norm() / first.norm())
        if not difference < NEAR:
            raise EpdError(f"picture {which[1]} of {which[0]} pixels came {difference:.3f} off what it was before")

    def pulse(self) -> Pulse:
        return Pulse()

    async def drain(self) -> None:
        """Whoever measures takes the cluster down when it has its figures."""

    async def close(self) -> None:
        await self._tasks.close()
        if self._link is not None:
            self._link.close()
        self._inbox.close()
        await self._transport.close()
