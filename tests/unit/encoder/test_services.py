"""Router and encoder ranks over real sockets, in one process, with a tower of arithmetic."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from epdctl.encoder.router import RouterService
from epdctl.encoder.worker import EncoderService
from epdctl.engine.api import Prepared
from epdctl.errors import EpdError, PoolExhausted
from epdctl.ids import Incarnation, RankName, RequestId
from epdctl.rank.service import Proof, Recorded, Service
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.landing import Owner
from epdctl.transfer.pool import Pool
from epdctl.transfer.zmq import ZmqTransport
from epdctl.wire.config import EncoderConfig, Limits
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ENCODER_TO_LANGUAGE,
    ROUTER_TO_CLIENT,
    ROUTER_TO_WORKER,
    WORKER_TO_ROUTER,
    CancelEncode,
    CancelItem,
    ClientToRouter,
    EmbeddingLanded,
    Encode,
    Encoded,
    EncodeFailed,
    EncodeItem,
    FailureKind,
    ItemEncoded,
    ItemFailed,
    ItemSized,
    MediaItem,
    RouterToClient,
    RouterToWorker,
    WorkerToRouter,
)
from epdctl.wire.lifecycle import Absent, Endpoints, Peer
from epdctl.wire.sockets import Inbox, Link
from epdctl.wire.transfer import WRITER_TO_RECEIVER, RemoteLease, TensorSpec, Write
from tests.support.ranks import Facts, make_peer, make_spec, run
from tests.support.towers import WIDTH, ToyTower, embedding, picture, toy_canary

ROWS = 5
NBYTES = ROWS * WIDTH * 4


class Prefill:
    """The rank that owns the slots."""

    def __init__(self, sockets: Path) -> None:
        owner = Owner(RankName("prefill/0"), Incarnation(1), "secret")
        self.transport = ZmqTransport(f"ipc://{sockets}/prefill.transfer", owner)
        self.pool = Pool("embeddings", torch.empty(1 << 16, dtype=torch.uint8), RangeAllocator(1 << 16))
        self.address = self.transport.register(self.pool)
        self.landed = Facts()
        self.inbox: Inbox[EmbeddingLanded] = Inbox(
            f"ipc://{sockets}/prefill.inbox", ENCODER_TO_LANGUAGE, lambda _, message, __: self.landed.add(message)
        )

    def lease(self, nbytes: int = NBYTES) -> RemoteLease:
        return self.pool.lease(nbytes, "r", seconds=600).remote(self.address)

    def read(self, landed: EmbeddingLanded) -> torch.Tensor:
        return self.pool.tensor(self.pool.filled(landed.lease, landed.generation), landed.spec)

    async def close(self) -> None:
        self.inbox.close()
        await self.transport.close()


class World:
    """Services in one loop, and the messages their neighbours see."""

    def __init__(self, sockets: Path, stack: AsyncExitStack) -> None:
        self.sockets = sockets
        self.stack = stack
        self.prefill = Prefill(sockets)
        stack.push_async_callback(self.prefill.close)
        self.peers: dict[str, Peer] = {}
        self.services: dict[str, Service] = {}

    async def add(self, service: Service, rank: str) -> Peer:
        self.stack.push_async_callback(service.close)
        endpoints = await service.start(lambda _, __, ___: None)
        self.services[rank] = service
        self.peers[rank] = make_peer(rank, endpoints)
        self.tell()
        return self.peers[rank]

    def tell(self) -> None:
        for rank, service in self.services.items():
            service.peers_changed([peer for peer in self.peers.values() if peer.rank != rank])

    async def router(self, **limits: Any) -> tuple[RouterService, Link[RouterToClient, ClientToRouter], Facts]:
        service = RouterService(make_spec("encoder-router/0", self.sockets, limits=Limits(**limits)))
        peer = await self.add(service, "encoder-router/0")
        answers = Facts()
        assert peer.endpoints.inbox is not None
        link: Link[RouterToClient, ClientToRouter] = Link(
            peer.endpoints.inbox, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, lambda message, _: answers.add(message)
        )
        self.stack.callback(link.close)
        return service, link, answers

    async def encoder(self, tower: ToyTower, number: int = 0, **config: Any) -> EncoderService:
        spec = make_spec(f"encoder/{number}", self.sockets, **config)
        service = EncoderService(spec, load=tower.load, canary=toy_canary)
        await self.add(service, f"encoder/{number}")
        return service

    def as_router(self, number: int = 0) -> tuple[Link[WorkerToRouter, RouterToWorker], Facts]:
        answers = Facts()
        endpoint = self.peers[f"encoder/{number}"].endpoints.inbox
        assert endpoint is not None
        link: Link[WorkerToRouter, RouterToWorker] = Link(
            endpoint, WORKER_TO_ROUTER, ROUTER_TO_WORKER, lambda message, _: answers.add(message)
        )
        self.stack.callback(link.close)
        return link, answers

    def job(self, index: int = 0, request: str = "r", *, slot: RemoteLease | None = None, **changed: Any) -> Encode:
        item: dict[str, Any] = {
            "index": index, "modality": "image", "content_hash": "", "of": 1, "grid": [1, 2, 2 * ROWS], "rows": ROWS,
        }  # fmt: skip
        budget = changed.pop("budget_s", 300.0)
        return Encode(
            request=RequestId(request),
            attempt=1,
            item=MediaItem(**{**item, **changed}),
            slot=slot or self.prefill.lease(),
            notify=self.prefill.inbox.endpoint,
            budget_s=budget,
        )

    def inline(self, index: int = 0, **changed: Any) -> Encode:
        """One without a slot."""
        return msgspec.structs.replace(self.job(index, **changed), slot=None, notify="")


def in_world(
    sockets: Path, test: Callable[[World], Coroutine[Any, Any, None]], unhandled: list[BaseException] | None = None
) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            await test(World(sockets, stack))

    run(work(), unhandled=unhandled)


def of(kind: type, number: int) -> Callable[[list[Any]], bool]:
    return lambda seen: sum(isinstance(message, kind) for message in seen) >= number


async def turns_until(fact: Callable[[], bool]) -> None:
    while True:
        if fact():
            return
        await asyncio.sleep(0)


class Gate:
    """Holds forwards, and tells the loop when one has begun."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.began = Facts()
        self._loop = asyncio.get_running_loop()

    def tower(self) -> ToyTower:
        return ToyTower(gate=self.open, began=self._tell)

    def _tell(self) -> None:
        self._loop.call_soon_threadsafe(self.began.add, 1)


def test_every_item_lands_in_its_own_slot_whoever_encodes_it(sockets: Path) -> None:
    async def test(world: World) -> None:
        _, gateway, answers = await world.router()
        for number in range(2):
            await world.encoder(ToyTower(), number)
        for index in range(8):
            gateway.send(world.job(index), [picture(ROWS, index)])
        told = await answers.count(8)
        assert {(type(message), message.index) for message in told} == {(Encoded, index) for index in range(8)}
        assert {message.by for message in told} == {"encoder/0", "encoder/1"}
        landed = {message.index: message for message in await world.prefill.landed.count(8)}
        for index, message in landed.items():
            assert torch.equal(world.prefill.read(message), embedding(ROWS, index))
        assert world.services["encoder-router/0"].pulse().completed == 8

    in_world(sockets, test)


def test_what_was_not_given_back_is_found_when_nothing_is_in_flight(sockets: Path) -> None:
    async def test(world: World) -> None:
        router, gateway, answers = await world.router()
        encoder = await world.encoder(ToyTower())
        router._media_bytes += 7
        encoder._here.makings.cache.bytes += 7
        assert (router.pulse().unhealthy, encoder.pulse().unhealthy) == (None, None), "nothing has happened yet"
        gateway.send(world.job(), [picture(ROWS, 0)])
        await answers.count(1)
        await turns_until(lambda: not encoder.pulse().inflight)
        assert router.pulse().unhealthy == "with nothing in flight, the bytes of pictures are off"
        assert encoder.pulse().unhealthy == "with nothing in flight, bytes are off"
        router._media_bytes -= 7
        encoder._here.makings.cache.bytes -= 7

    in_world(sockets, test)


def test_a_batch_is_formed_from_whatever_waits_across_requests_within_its_budget(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        await world.encoder(tower, encoder=EncoderConfig(batch_patches=3 * 4 * ROWS))
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=100, job=world.job()), [picture(ROWS, 100)])
        await gate.began.count(1)
        for number in range(5):
            job = world.job(request=f"request {number}")
            router.send(EncodeItem(dispatch=number, job=job), [picture(ROWS, number)])
        await answers.until(of(ItemSized, 6))
        gate.open.set()
        await answers.until(of(ItemEncoded, 6))
        assert [len(batch) for batch in tower.batches] == [1, 3, 2]
        assert sorted(tower.batches[1] + tower.batches[2]) == [0, 1, 2, 3, 4]

    in_world(sockets, test)


def test_what_is_prepared_for_the_tower_is_bounded_in_bytes_and_what_waits_is_shown(sockets: Path) -> None:
    """64 pictures of 16.7 Mpx in flight were 24 GiB of float32 patches."""

    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        one = 4 * ROWS * 8  # bytes of what ToyTower prepares
        encoder = await world.encoder(tower, encoder=EncoderConfig(prepared_bytes=2 * one))
        router, answers = world.as_router()
        for number in range(5):
            router.send(EncodeItem(dispatch=number, job=world.job(number)), [picture(ROWS, number)])
        await gate.began.count(1)
        await answers.until(of(ItemSized, 2))
        await turns_until(lambda: encoder.pulse().inflight == 5)
        figures = encoder.pulse().embeddings
        assert figures is not None
        assert figures.prepared_bytes == 2 * one
        assert encoder.pulse().waiting == 5 - len(tower.batches[0])
        assert len(answers.seen) == 2, "nobody else was prepared"
        gate.open.set()
        await answers.until(of(ItemEncoded, 5))
        figures = encoder.pulse().embeddings
        assert figures is not None
        assert figures.prepared_bytes == 0

    in_world(sockets, test)


def test_a_rank_has_room_again_before_it_answers(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router sends the next item as soon as it hears; it was told FULL while the one before was cleared away."""
    reply = Inbox.reply

    async def test(world: World) -> None:
        encoder = await world.encoder(ToyTower(), limits=Limits(inflight=1))
        inflight: list[int] = []

        def noted(inbox: Inbox[Any], to: bytes, message: Any, codec: Any, frames: Any = ()) -> None:
            if isinstance(message, ItemEncoded):
                inflight.append(encoder.pulse().inflight)
            reply(inbox, to, message, codec, frames)

        monkeypatch.setattr(Inbox, "reply", noted)
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job()), [picture(ROWS, 1)])
        await answers.until(of(ItemEncoded, 1))
        assert inflight == [0]

    in_world(sockets, test)


def test_the_shape_is_said_before_the_forward_and_the_slot_is_told_before_the_router(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        await world.encoder(gate.tower())
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=7, job=world.job()), [picture(ROWS, 3)])
        spec = TensorSpec(dtype="float32", shape=[ROWS, WIDTH], nbytes=NBYTES)
        assert await answers.count(1) == [ItemSized(dispatch=7, spec=spec)]
        gate.open.set()
        assert (await answers.count(2))[1] == ItemEncoded(dispatch=7, spec=spec)
        (landed,) = await world.prefill.landed.count(1)
        assert torch.equal(world.prefill.read(landed), embedding(ROWS, 3))

    in_world(sockets, test)


@pytest.mark.parametrize(
    ("media", "changed", "kind", "text"),
    [
        (b"torn", {}, FailureKind.BAD_MEDIA, "the picture is torn"),
        (b"bug", {}, FailureKind.INTERNAL, "in the image library"),
        (picture(ROWS + 1, 1), {}, FailureKind.BAD_MEDIA, "makes 6 rows"),
        (picture(ROWS, 1), {"grid": [1, 4, ROWS]}, FailureKind.BAD_MEDIA, "promised 5 of"),
        (picture(ROWS, 1), {"budget_s": 0.0}, FailureKind.DEADLINE, "not encoded within"),
    ],
)
def test_what_is_wrong_with_one_picture_is_told_and_the_next_one_is_encoded(
    sockets: Path, media: bytes, changed: dict, kind: FailureKind, text: str
) -> None:
    async def test(world: World) -> None:
        tower = ToyTower()
        await world.encoder(tower)
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job(**changed)), [media])
        await answers.until(of(ItemFailed, 1))
        failed = answers.seen[-1]
        assert (failed.dispatch, failed.kind) == (1, kind)
        assert text in failed.text
        assert tower.batches == []
        router.send(EncodeItem(dispatch=2, job=world.job()), [picture(ROWS, 2)])
        await answers.until(of(ItemEncoded, 1))

    in_world(sockets, test)


def test_a_slot_that_is_too_small_gone_or_unreachable(sockets: Path) -> None:
    async def test(world: World) -> None:
        await world.encoder(ToyTower())
        router, answers = world.as_router()
        stale = world.prefill.lease()
        world.prefill.pool.release(stale.lease)
        jobs = [world.job(slot=world.prefill.lease(8)), world.job(slot=stale)]
        for dispatch, job in enumerate(jobs):
            router.send(EncodeItem(dispatch=dispatch, job=job), [picture(ROWS, 1)])
        await answers.until(of(ItemFailed, 2))
        ends = {m.dispatch: (m.kind, m.text) for m in answers.seen if isinstance(m, ItemFailed)}
        assert ends[0] == (FailureKind.INTERNAL, f"{NBYTES} bytes of embeddings do not fit a slot of 8")
        assert ends[1][0] is FailureKind.RANK_LOST
        assert world.prefill.landed.seen == []
        with pytest.raises(PoolExhausted):
            world.prefill.lease(1 << 20)

    in_world(sockets, test)


def test_the_death_of_the_slots_owner_ends_the_write_that_waits_for_it(sockets: Path) -> None:
    async def test(world: World) -> None:
        await world.encoder(ToyTower())
        taken = Facts()
        hole: Inbox[Write] = Inbox(
            f"ipc://{world.sockets}/hole", WRITER_TO_RECEIVER, lambda _, write, __: taken.add(write)
        )
        world.stack.callback(hole.close)
        world.peers["prefill/7"] = make_peer("prefill/7", Endpoints(transfer=hole.endpoint))
        world.tell()
        slot = world.prefill.lease()
        slot = msgspec.structs.replace(slot, pool=msgspec.structs.replace(slot.pool, endpoint=hole.endpoint))
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job(slot=slot)), [picture(ROWS, 1)])
        await taken.count(1)
        del world.peers["prefill/7"]
        world.tell()
        await answers.until(of(ItemFailed, 1))
        assert answers.seen[-1].kind is FailureKind.RANK_LOST

    in_world(sockets, test)


def test_a_cancelled_item_never_reaches_the_tower(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        encoder = await world.encoder(tower)
        router, answers = world.as_router()
        for number in range(3):
            router.send(EncodeItem(dispatch=number, job=world.job(number)), [picture(ROWS, number)])
            await answers.until(of(ItemSized, number + 1))
        await gate.began.count(1)
        router.send(CancelItem(dispatch=1))
        router.send(CancelItem(dispatch=99))
        router.send(EncodeItem(dispatch=3, job=world.job(3)), [picture(ROWS, 3)])
        await answers.until(of(ItemSized, 4))
        gate.open.set()
        await answers.until(of(ItemEncoded, 3))
        assert tower.batches == [[0], [2, 3]]
        assert encoder.pulse().completed == 4
        assert encoder.pulse().inflight == 0

    in_world(sockets, test)


def test_an_item_moves_when_its_rank_is_withdrawn_and_the_late_one_changes_nothing(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        _, gateway, answers = await world.router()
        await world.encoder(gate.tower(), 0)
        gateway.send(world.job(), [picture(ROWS, 4)])
        await gate.began.count(1)
        second = ToyTower()
        await world.encoder(second, 1)
        del world.peers["encoder/0"]
        world.tell()
        (told,) = await answers.count(1)
        assert (type(told), told.by) == (Encoded, "encoder/1")
        (landed,) = await world.prefill.landed.count(1)
        assert torch.equal(world.prefill.read(landed), embedding(ROWS, 4))
        gate.open.set()  # the first rank finishes after all: into a slot that is filled
        await world.prefill.landed.count(2)
        assert torch.equal(world.prefill.read(landed), embedding(ROWS, 4))
        assert len(answers.seen) == 1

    in_world(sockets, test)


def test_the_router_says_no_rank_full_and_lost(sockets: Path) -> None:
    async def test(world: World) -> None:
        router, gateway, answers = await world.router(inflight=1, queue=1, media_bytes=300_000)
        gateway.send(world.job(0, budget_s=0.01), [picture(ROWS, 1)])
        (end,) = await answers.count(1)
        assert isinstance(end, EncodeFailed)
        assert (end.index, end.kind, end.text) == (0, FailureKind.NO_RANK, "no encoder was ready within the deadline")
        gate = Gate()
        await world.encoder(gate.tower())
        for index in range(1, 4):
            gateway.send(world.job(index), [picture(ROWS, 1)])
        end = (await answers.count(2))[1]
        assert (end.index, end.kind) == (3, FailureKind.FULL)
        gateway.send(world.job(4), [bytes(200_000)])
        end = (await answers.count(3))[2]
        assert (end.index, end.kind) == (4, FailureKind.FULL)
        assert "the limit is 300000" in end.text
        gateway.send(world.job(5))
        end = (await answers.count(4))[3]
        assert (end.index, end.kind) == (5, FailureKind.INTERNAL)
        assert router.pulse().inflight == 2
        await gate.began.count(1)
        del world.peers["encoder/0"]
        world.tell()
        end = (await answers.count(5))[4]
        assert (end.index, end.kind) == (1, FailureKind.RANK_LOST)
        gate.open.set()

    in_world(sockets, test)


def absent(rank: str, hopeless: str | None = None) -> Absent:
    name = RankName(rank)
    return Absent(rank=name, stage=name.stage, incarnation=Incarnation(1), hopeless=hopeless)


def test_without_a_rank_an_item_waits_a_while_and_not_at_all_where_none_is_coming(sockets: Path) -> None:
    """``/encode`` hung for its whole time, 300 s, where a gateway says 503 after limits.wait_seconds."""

    async def test(world: World) -> None:
        _, gateway, answers = await world.router(wait_seconds=0.01)
        gateway.send(world.job(0), [picture(ROWS, 1)])
        (end,) = await answers.count(1)
        text = "no encoder is ready; it waited 0.01 s (limits.wait_seconds)"
        assert (end.kind, end.text) == (FailureKind.NO_RANK, text)

    in_world(sockets, test)

    async def hopeless(world: World) -> None:
        router, gateway, answers = await world.router(wait_seconds=3600.0)
        gateway.send(world.job(0), [picture(ROWS, 1)])
        await turns_until(lambda: router.pulse().inflight == 1)
        router.absent_changed([absent("encoder/0", "failed: no weights"), absent("encoder/1"), absent("prefill/0")])
        world.tell()
        assert router.pulse().inflight == 1, "one of them may come"
        router.absent_changed([absent("encoder/0", "failed: no weights"), absent("prefill/0")])
        world.tell()
        (end,) = await answers.count(1)
        text = "no encoder is ready; encoder/0 is failed: no weights"
        assert (end.kind, end.text) == (FailureKind.NO_RANK, text)

    in_world(sockets, hopeless)


def test_an_item_whose_rank_died_waits_for_the_one_that_is_coming_back_and_then_only_so_long(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        router, gateway, answers = await world.router(wait_seconds=0.2)
        await world.encoder(gate.tower(), 0)
        gateway.send(world.job(0), [picture(ROWS, 1)])
        await gate.began.count(1)
        del world.peers["encoder/0"]
        router.absent_changed([absent("encoder/0"), absent("encoder/1")])
        world.tell()
        assert router.pulse().waiting == 1
        (end,) = await answers.count(1)
        text = "lost with encoder/0; no other encoder is ready; it waited 0.2 s (limits.wait_seconds)"
        assert (end.kind, end.text) == (FailureKind.RANK_LOST, text)
        gate.open.set()

    in_world(sockets, test)


def test_a_client_that_gives_up_frees_its_place_everywhere(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        router, gateway, answers = await world.router(inflight=1)
        encoder = await world.encoder(gate.tower(), limits=Limits(inflight=1))
        gateway.send(world.job(0, "left"), [picture(ROWS, 0)])
        gateway.send(world.job(1, "left"), [picture(ROWS, 1)])
        gateway.send(world.job(2, "stays"), [picture(ROWS, 2)])
        await gate.began.count(1)
        gateway.send(CancelEncode(request=RequestId("left"), attempt=1))
        gate.open.set()
        (told,) = await answers.count(1)
        assert (type(told), told.request) == (Encoded, "stays")
        await router.drain()
        await encoder.drain()
        assert (router.pulse().inflight, encoder.pulse().inflight) == (0, 0)

    in_world(sockets, test)


def test_the_place_of_an_item_that_was_given_up_is_free_for_the_next_one(sockets: Path) -> None:
    """Whoever gives an item up sends the next one right behind; that one was told FULL."""

    async def test(world: World) -> None:
        gate = Gate()
        encoder = await world.encoder(gate.tower(), limits=Limits(inflight=1))
        world.peers["encoder-router/0"] = make_peer("encoder-router/0")
        world.tell()
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job(0)), [picture(ROWS, 0)])
        await gate.began.count(1)
        router.send(CancelItem(dispatch=1))
        router.send(EncodeItem(dispatch=2, job=world.job(1)), [picture(ROWS, 1)])
        assert [message.dispatch for message in await answers.until(of(ItemSized, 2))] == [1, 2]
        del world.peers["encoder-router/0"]
        world.tell()  # the next router's items may come in this very turn
        assert encoder.pulse().inflight == 0
        router.send(EncodeItem(dispatch=3, job=world.job(2)), [picture(ROWS, 2)])
        gate.open.set()
        await answers.until(of(ItemEncoded, 1))
        assert [message.dispatch for message in answers.seen] == [1, 2, 3, 3]

    in_world(sockets, test)


def test_a_rank_with_less_room_than_was_thought_ends_nothing(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        router, gateway, answers = await world.router(inflight=4)
        await world.encoder(gate.tower(), 0, limits=Limits(inflight=1))
        for index in range(2):
            gateway.send(world.job(index), [picture(ROWS, index)])
        await gate.began.count(1)
        await turns_until(lambda: router.waiting == 1)
        await world.encoder(ToyTower(), 1, limits=Limits(inflight=1))
        (first,) = await answers.count(1)
        assert (type(first), first.index, first.by) == (Encoded, 1, "encoder/1"), "another had room"
        for index in range(2, 6):
            gateway.send(world.job(index), [picture(ROWS, index)])
        await answers.count(5)
        gate.open.set()
        assert {type(told) for told in await answers.count(6)} == {Encoded}

    in_world(sockets, test)


def test_draining_finishes_what_is_there_and_takes_nothing_new(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        encoder = await world.encoder(gate.tower())
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job()), [picture(ROWS, 1)])
        await gate.began.count(1)
        drained = asyncio.ensure_future(encoder.drain())
        await asyncio.sleep(0)
        router.send(EncodeItem(dispatch=2, job=world.job()), [picture(ROWS, 2)])
        await answers.until(of(ItemFailed, 1))
        assert (answers.seen[-1].dispatch, answers.seen[-1].kind) == (2, FailureKind.NO_RANK), "another may take it"
        assert not drained.done()
        gate.open.set()
        await drained
        await answers.until(of(ItemEncoded, 1))

    in_world(sockets, test)


def test_an_embedding_that_no_answer_holds_is_refused_before_anything_is_done_about_it(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZMQ gave the connection up for it, and the rank was a black hole from then on."""
    monkeypatch.setattr("epdctl.encoder.worker.MAX_FRAME_BYTES", NBYTES)

    async def test(world: World) -> None:
        tower = ToyTower()
        _, gateway, answers = await world.router()
        await world.encoder(tower)
        gateway.send(world.inline(0, rows=ROWS + 1, grid=[1, 2, 2 * ROWS + 2]), [picture(ROWS + 1, 1)])
        (end,) = await answers.count(1)
        text = f"{NBYTES + WIDTH * 4} bytes of embeddings do not fit an answer, which holds {NBYTES}"
        assert (end.kind, end.text) == (FailureKind.TOO_LARGE, text)
        gateway.send(world.inline(1), [picture(ROWS, 2)])
        gateway.send(
            world.job(2, rows=ROWS + 1, grid=[1, 2, 2 * ROWS + 2], slot=world.prefill.lease(1 << 10)),
            [picture(ROWS + 1, 3)],
        )
        await answers.until(of(Encoded, 2))
        assert sorted(seed for batch in tower.batches for seed in batch) == [2, 3]

    in_world(sockets, test)


class RudeEncoder:
    """Answers its first item with a frame that no link takes."""

    def __init__(self, world: World) -> None:
        self.endpoint = f"ipc://{world.sockets}/rude"
        self.told: list[RouterToWorker] = []
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self.endpoint)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._answer)
        world.stack.callback(self._socket.close)
        world.stack.callback(loop.remove_reader, self._socket.fileno())

    def _answer(self) -> None:
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            sender, word, *_ = self._socket.recv_multipart()
            message = ROUTER_TO_WORKER.decode(word)
            self.told.append(message)
            if isinstance(message, EncodeItem):
                first = len(self.told) == 1
                spec = TensorSpec(dtype="float32", shape=[1], nbytes=4)
                answer = WORKER_TO_ROUTER.encode(ItemEncoded(dispatch=message.dispatch, spec=spec))
                self._socket.send_multipart([sender, answer, bytes(2 << 20 if first else 4)])


def test_a_rank_whose_connection_broke_is_given_its_items_again_once_it_stands(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epdctl.wire.sockets.MAX_FRAME_BYTES", 1 << 20)

    async def test(world: World) -> None:
        router, gateway, answers = await world.router()
        rude = RudeEncoder(world)
        world.peers["encoder/0"] = make_peer("encoder/0", Endpoints(inbox=rude.endpoint))
        router.absent_changed([absent("encoder/1")])
        world.tell()
        assert len(router.open_ranks()) == 1
        gateway.send(world.inline(0), [picture(ROWS, 0)])
        await turns_until(lambda: router.pulse().waiting == 1)
        assert not router.open_ranks(), "nobody asks it anything while it cannot answer"
        gateway.send(world.inline(1), [picture(ROWS, 1)])
        (told,) = await answers.until(of(Encoded, 1))
        assert (told.index, told.by) == (1, "encoder/0")
        assert router.open_ranks() == router._dispatcher.ranks, "it stands again"
        kinds = [type(message) for message in rude.told]
        assert kinds == [EncodeItem, CancelItem, EncodeItem], "what it may still be at is called off first"
        await world.encoder(ToyTower(), 1)
        told = (await answers.until(of(Encoded, 2)))[-1]
        assert (told.index, told.by) == (0, "encoder/1"), "once on each rank, whatever became of it there"

    in_world(sockets, test)


def test_an_encoder_takes_no_more_than_its_limit(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        await world.encoder(gate.tower(), limits=Limits(inflight=2))
        router, answers = world.as_router()
        for number in range(3):
            router.send(EncodeItem(dispatch=number, job=world.job(number)), [picture(ROWS, number)])
        await answers.until(of(ItemFailed, 1))
        assert [(m.dispatch, m.kind) for m in answers.seen if isinstance(m, ItemFailed)] == [(2, FailureKind.FULL)]
        gate.open.set()
        await answers.until(of(ItemEncoded, 2))

    in_world(sockets, test)


def test_the_loss_of_the_router_frees_what_was_done_for_it(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        encoder = await world.encoder(gate.tower())
        world.peers["encoder-router/0"] = make_peer("encoder-router/0")
        world.tell()
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job()), [picture(ROWS, 1)])
        await answers.until(of(ItemSized, 1))
        del world.peers["encoder-router/0"]
        world.tell()
        gate.open.set()
        await encoder.drain()
        assert world.prefill.landed.seen == []

    in_world(sockets, test)


def test_an_encoder_that_finds_itself_withdrawn_gives_up_what_it_had(sockets: Path) -> None:
    """It only stood still; its items are with others now, who write to the same slots."""

    async def test(world: World) -> None:
        gate = Gate()
        encoder = await world.encoder(gate.tower())
        encoder.peers_changed([world.peers["encoder/0"]])
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job()), [picture(ROWS, 1)])
        await answers.until(of(ItemSized, 1))
        encoder.peers_changed([])
        gate.open.set()
        await encoder.drain()
        assert world.prefill.landed.seen == []

    in_world(sockets, test)


def test_an_item_that_was_sent_before_and_is_read_after_is_not_encoded(sockets: Path) -> None:
    async def test(world: World) -> None:
        encoder = await world.encoder(ToyTower())
        for epoch in (1, 2):
            encoder.peers_changed([msgspec.structs.replace(world.peers["encoder/0"], epoch=epoch)])
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job(), epoch=1), [picture(ROWS, 1)])
        router.send(EncodeItem(dispatch=2, job=world.job(), epoch=2), [picture(ROWS, 1)])
        await answers.until(of(ItemEncoded, 1))
        assert {answer.dispatch for answer in answers.seen} == {2}

    in_world(sockets, test)


def test_a_router_that_finds_itself_withdrawn_ends_all_it_has(sockets: Path) -> None:
    async def test(world: World) -> None:
        router, gateway, answers = await world.router()
        gateway.send(world.job(), [picture(ROWS, 1)])
        await turns_until(lambda: router.pulse().inflight == 1)
        router.peers_changed([world.peers["encoder-router/0"]])
        router.peers_changed([msgspec.structs.replace(world.peers["encoder-router/0"], epoch=1)])
        (end,) = await answers.count(1)
        assert (type(end), end.kind) == (EncodeFailed, FailureKind.RANK_LOST)
        assert router.pulse().inflight == 0

    in_world(sockets, test)


def test_an_encoder_that_leaves_is_given_nothing_new_and_loses_nothing(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        _, gateway, answers = await world.router()
        await world.encoder(gate.tower(), 0)
        gateway.send(world.job(0), [picture(ROWS, 1)])
        await gate.began.count(1)
        world.peers["encoder/0"] = msgspec.structs.replace(world.peers["encoder/0"], accepting=False)
        await world.encoder(ToyTower(), 1)
        gateway.send(world.job(1), [picture(ROWS, 2)])
        (first,) = await answers.count(1)
        assert (first.index, first.by) == (1, "encoder/1")
        gate.open.set()
        _, second = await answers.count(2)
        assert (second.index, second.by) == (0, "encoder/0")

    in_world(sockets, test)


def test_the_same_request_id_from_two_clients_is_two_requests(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        _, first, told = await world.router()
        await world.encoder(gate.tower())
        endpoint = world.peers["encoder-router/0"].endpoints.inbox
        assert endpoint is not None
        told_too = Facts()
        second: Link[RouterToClient, ClientToRouter] = Link(
            endpoint, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, lambda message, _: told_too.add(message)
        )
        world.stack.callback(second.close)
        slots = [world.prefill.lease(), world.prefill.lease()]
        for seed, client in enumerate((first, second)):
            client.send(world.job(slot=slots[seed]), [picture(ROWS, seed)])
        first.send(world.job(slot=slots[0]), [picture(ROWS, 0)])  # and a repetition is the same item
        gate.open.set()
        await told.count(1)
        await told_too.count(1)
        landed = {message.lease: message for message in await world.prefill.landed.count(2)}
        for seed, slot in enumerate(slots):
            assert torch.equal(world.prefill.read(landed[slot.lease]), embedding(ROWS, seed))
        assert (len(told.seen), len(told_too.seen)) == (1, 1)

    in_world(sockets, test)


NOISE = 10_000


def test_ten_thousand_bad_frames_in_every_direction_end_no_listener(sockets: Path) -> None:
    async def test(world: World) -> None:
        _, gateway, answers = await world.router()
        await world.encoder(ToyTower())
        for rank in ("encoder-router/0", "encoder/0"):
            flood(world, rank)
        gateway.send(world.job(), [picture(ROWS, 3)])
        (told,) = await answers.count(1)
        assert isinstance(told, Encoded)
        router, encoder = world.services["encoder-router/0"], world.services["encoder/0"]
        assert isinstance(router, RouterService)
        await turns_until(lambda: router.dropped["unreadable"] == unreadable(encoder) == NOISE)

    in_world(sockets, test)


def unreadable(encoder: Service) -> int:
    figures = encoder.pulse().embeddings
    return 0 if figures is None else figures.unreadable


def flood(world: World, rank: str) -> None:
    """NOISE frames of every bad kind, as fast as they go."""
    endpoint = world.peers[rank].endpoints.inbox
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 2 * NOISE)
    socket.connect(str(endpoint))
    for number in range(NOISE):
        socket.send_multipart([b"\xc1", b"", b"\x81\xa1t\xa7Unknown", b"\x80" * 3][number % 4 :])
    world.stack.callback(socket.close, 0)


class NoisyEncoder:
    """Answers every item with NOISE bad frames first."""

    def __init__(self, world: World) -> None:
        self.inbox = Inbox(f"ipc://{world.sockets}/noisy", ROUTER_TO_WORKER, self._arrived)
        world.stack.callback(self.inbox.close)

    def _arrived(self, router: bytes, message: RouterToWorker, _: list[memoryview]) -> None:
        assert isinstance(message, EncodeItem)
        for _number in range(NOISE // 8):  # beyond the high water mark zmq drops them, and nothing would be proved
            self.inbox.reply(router, CancelItem(dispatch=1), ROUTER_TO_WORKER)
        spec = TensorSpec(dtype="float32", shape=[1], nbytes=4)
        for _again in range(2):
            self.inbox.reply(router, ItemEncoded(dispatch=message.dispatch, spec=spec), WORKER_TO_ROUTER)


def test_bad_frames_of_a_rank_do_not_end_the_routers_listener(sockets: Path) -> None:
    async def test(world: World) -> None:
        router, gateway, answers = await world.router()
        noisy = NoisyEncoder(world)
        world.peers["encoder/0"] = make_peer("encoder/0", Endpoints(inbox=noisy.inbox.endpoint))
        world.tell()
        for index in range(8):
            gateway.send(world.job(index), [picture(ROWS, index)])
            await answers.count(index + 1)
        await turns_until(lambda: router.dropped == {"late": 8, "unreadable": NOISE})
        del world.peers["encoder/0"]
        world.tell()
        assert router.dropped["unreadable"] == NOISE, "those of a rank that left are not forgotten"

    in_world(sockets, test)


def same(number: int, content: str = "h") -> Callable[[World], Encode]:
    return lambda world: world.job(number, f"request {number}", content_hash=content)


def test_identical_pictures_in_flight_are_encoded_once_and_each_lands_in_its_own_slot(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        await world.encoder(tower)
        router, answers = world.as_router()
        for number in range(4):
            router.send(EncodeItem(dispatch=number, job=same(number)(world)), [picture(ROWS, 5)])
        await answers.until(of(ItemSized, 4))
        router.send(CancelItem(dispatch=0))  # the one that began it leaves: the others go on
        gate.open.set()
        await answers.until(of(ItemEncoded, 3))
        assert tower.batches == [[5]]
        for message in await world.prefill.landed.count(3):
            assert torch.equal(world.prefill.read(message), embedding(ROWS, 5))
        router.send(EncodeItem(dispatch=9, job=same(9)(world)), [picture(ROWS, 5)])
        encoded = (await answers.until(of(ItemEncoded, 4)))[-1]
        assert (tower.batches, encoded.source) == ([[5]], "cached")
        assert encoded.cache_bytes == NBYTES

    in_world(sockets, test)


def test_when_the_last_one_leaves_nothing_is_encoded_and_the_next_begins_anew(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        await world.encoder(tower)
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=0, job=world.job()), [picture(ROWS, 1)])
        await gate.began.count(1)
        for number in (1, 2):
            router.send(EncodeItem(dispatch=number, job=same(number)(world)), [picture(ROWS, 2)])
        await answers.until(of(ItemSized, 3))
        router.send(CancelItem(dispatch=1))
        router.send(CancelItem(dispatch=2))
        router.send(EncodeItem(dispatch=3, job=same(3)(world)), [picture(ROWS, 2)])
        await answers.until(of(ItemSized, 4))
        gate.open.set()
        await answers.until(of(ItemEncoded, 2))
        assert tower.batches == [[1], [2]]

    in_world(sockets, test)


def test_a_refusal_is_told_to_everyone_who_shares_it_and_not_remembered(sockets: Path) -> None:
    async def test(world: World) -> None:
        tower = ToyTower()
        await world.encoder(tower)
        router, answers = world.as_router()
        for number in range(3):
            router.send(EncodeItem(dispatch=number, job=same(number)(world)), [b"torn"])
        await answers.until(of(ItemFailed, 3))
        assert {message.kind for message in answers.seen} == {FailureKind.BAD_MEDIA}
        router.send(EncodeItem(dispatch=3, job=same(3)(world)), [picture(ROWS, 3)])
        await answers.until(of(ItemEncoded, 1))

    in_world(sockets, test)


@pytest.mark.parametrize(("cache", "content"), [(0, "h"), (1 << 20, "")])
def test_without_a_cache_or_a_name_every_picture_is_encoded(sockets: Path, cache: int, content: str) -> None:
    async def test(world: World) -> None:
        tower = ToyTower()
        await world.encoder(tower, encoder=EncoderConfig(cache_bytes=cache))
        router, answers = world.as_router()
        for number in range(3):
            job = same(number, content)(world)
            router.send(EncodeItem(dispatch=number, job=job), [picture(ROWS, number)])
            encoded = (await answers.until(of(ItemEncoded, number + 1)))[-1]
            assert (encoded.source, encoded.cache_bytes) == ("made", 0)
        assert tower.batches == [[0], [1], [2]]

    in_world(sockets, test)


def test_a_broken_device_shows_although_work_is_staged_on_it(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        encoder = await world.encoder(tower, encoder=EncoderConfig(canary_seconds=0.0, canary_deadline=0.05))
        assert encoder.pulse().unhealthy is None
        router, answers = world.as_router()
        for number in range(3):
            router.send(EncodeItem(dispatch=number, job=world.job(number)), [picture(ROWS, number)])
        await answers.until(of(ItemSized, 3))  # staged, and the forward never ends
        await gate.began.count(1)
        await turns_until(lambda: encoder.pulse().unhealthy is not None)
        assert encoder.pulse().unhealthy == "the test item was not encoded within 0.05 s"
        assert encoder.pulse().standstill > 0.0, "and it is known since when"
        gate.open.set()
        await turns_until(lambda: encoder.pulse().unhealthy is None)
        assert encoder.pulse().standstill < 60.0
        tower.canary = lambda: torch.full((1, WIDTH), torch.nan)
        await turns_until(lambda: encoder.pulse().unhealthy is not None)
        assert "has norm nan" in str(encoder.pulse().unhealthy)

    in_world(sockets, test)


def test_a_canary_does_not_wait_behind_what_is_prepared(sockets: Path) -> None:
    """Two long videos held the threads for longer than the canary had, and a healthy rank was given up."""

    async def test(world: World) -> None:
        tower, go_on = ToyTower(), threading.Event()
        prepare, begun = tower.prepare, Facts()
        loop = asyncio.get_running_loop()

        def preparing(media: bytes | memoryview, item: MediaItem) -> Prepared:
            if item.rows == ROWS:
                loop.call_soon_threadsafe(begun.add, 1)
                assert go_on.wait(60), "the test never let it go on"
            return prepare(media, item)

        tower.prepare = preparing  # type: ignore[method-assign]
        encoder = await world.encoder(tower, encoder=EncoderConfig(preprocess_threads=1))
        router, answers = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job()), [picture(ROWS, 1)])
        await begun.count(1)
        assert await encoder.prove() == Proof()
        go_on.set()
        await answers.until(of(ItemEncoded, 1))

    in_world(sockets, test)


def test_a_rank_that_cannot_encode_its_canary_never_becomes_ready(sockets: Path) -> None:
    async def test(world: World) -> None:
        tower = ToyTower()
        tower.canary = lambda: torch.full((1, WIDTH), torch.inf)
        with pytest.raises(EpdError, match="norm inf"):
            await world.encoder(tower)

    in_world(sockets, test)


def test_a_tower_that_fails_ends_the_rank(sockets: Path) -> None:
    unhandled: list[BaseException] = []

    async def test(world: World) -> None:
        failed = Facts()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failed.add(context.get("exception")))
        await world.encoder(ToyTower())
        router, _ = world.as_router()
        router.send(EncodeItem(dispatch=1, job=world.job()), [picture(ROWS, 666)])
        (error,) = await failed.count(1)
        assert str(error) == "a kernel failed"

    in_world(sockets, test, unhandled)


def test_a_capture_of_two_batches_is_a_chrome_trace(sockets: Path, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        encoder = await world.encoder(ToyTower())
        router, answers = world.as_router()
        written = Facts()
        loop = asyncio.get_running_loop()
        path = tmp_path / "captures" / "encoder-0.1.json"

        def done(recorded: Recorded) -> None:
            loop.call_soon_threadsafe(written.add, recorded)

        encoder.start_capture(str(path), 2, done)
        encoder.start_capture(str(tmp_path / "second.json"), 2, done)
        assert await written.count(1) == [Recorded(error=f"a capture to {path} is under way")]
        for number in range(2):
            router.send(EncodeItem(dispatch=number, job=world.job(number)), [picture(ROWS, number)])
            await answers.until(of(ItemEncoded, number + 1))
        assert (await written.count(2))[1] == Recorded()
        assert [found.name for found in path.parent.iterdir()] == [path.name]
        assert any("arange" in event.get("name", "") for event in json.loads(path.read_text())["traceEvents"])
        blocked = tmp_path / "file"
        blocked.touch()
        encoder.start_capture(str(blocked / "trace.json"), None, done)
        router.send(EncodeItem(dispatch=2, job=world.job(2)), [picture(ROWS, 2)])
        await answers.until(of(ItemEncoded, 3))
        encoder.stop_capture()
        assert "was not written" in (await written.count(3))[2].error
        encoder.stop_capture()

    in_world(sockets, test)


def test_a_capture_without_a_batch_says_so_and_leaves_no_file(sockets: Path, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        encoder = await world.encoder(ToyTower())
        written = Facts()
        loop = asyncio.get_running_loop()

        def done(recorded: Recorded) -> None:
            loop.call_soon_threadsafe(written.add, recorded)

        encoder.start_capture(str(tmp_path / "trace.json"), None, done)
        encoder.stop_capture()
        assert await written.count(1) == [Recorded(note="no batch ran while it recorded, so there is no trace")]
        assert not (tmp_path / "trace.json").exists()

    in_world(sockets, test)


@pytest.mark.parametrize("module", ["epdctl.encoder.surface", "epdctl.encoder.client"])
def test_the_surface_and_its_reader_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'transformers'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["epdctl.encoder.router", "epdctl.rank.process", "epdctl.rank.__main__"])
def test_what_needs_no_model_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'transformers', 'numpy'}} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
