"""A mono rank with a fake engine and a tower of arithmetic, asked over its two real inboxes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from epdctl.encoder.worker import EncoderService
from epdctl.engine.kv import KvPool
from epdctl.errors import LoadError
from epdctl.ids import Modality, Stage
from epdctl.mono.service import MonoService
from epdctl.rank.machine import NATIVE, Loaded, Machine, Parts
from epdctl.rank.service import Recorded
from epdctl.wire.config import ModelConfig, RankSpec
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ROUTER_TO_CLIENT,
    CancelEncode,
    ClientToRouter,
    Encode,
    Encoded,
    EncodeFailed,
    FailureKind,
    MediaItem,
    RouterToClient,
)
from epdctl.wire.lifecycle import Endpoints
from epdctl.wire.serve import Abort, Failed, Finished, Generate, Granted
from epdctl.wire.sockets import Link
from tests.support.language_ranks import (
    LAYOUT,
    FakeEngine,
    Gateway,
    Question,
    Rank,
    Setup,
    World,
    alone,
    item,
    peer_of,
    run,
    until,
    world,
)
from tests.support.ranks import Facts
from tests.support.towers import WIDTH, ToyTower, embedding, picture, toy_canary

SETUP = Setup(backend="memory")


def asked(*rows: int, **more: object) -> Question:
    """A question with a picture of so many rows each; picture n has seed n + 1."""
    items = tuple(item(n, 2 + sum(rows[:n]), count) for n, count in enumerate(rows))
    question = Question(
        tokens=tuple(range(100, 105 + sum(rows))),
        items=items,
        embeddings={n: embedding(count, n + 1) for n, count in enumerate(rows)},
    )
    return replace(question, **more)  # type: ignore[arg-type]


@dataclass
class Scene:
    """A mono rank, and a gateway that speaks to both of its inboxes."""

    service: MonoService
    engine: FakeEngine
    tower: ToyTower
    endpoints: Endpoints
    gateway: Gateway
    link: Link[object, object]
    pictures: Link[RouterToClient, ClientToRouter]
    encoded: Facts = field(default_factory=Facts)

    def ask(self, question: Question) -> None:
        self.link.send(Generate(
            request=question.request, attempt=question.attempt, tokens=list(question.tokens),
            items=list(question.items), sampling=question.sampling, budget_s=question.budget_s,
        ))  # fmt: skip

    async def show(self, question: Question, media: Sequence[bytes] = ()) -> Granted:
        """Send the pictures to the slots that were granted."""
        granted = await self.gateway.hear(Granted, question.name, question.attempt)
        for place, (each, slot) in enumerate(zip(question.items, granted.slots, strict=True)):
            grid = [1, 2, 2 * each.rows]
            of = len(question.items)
            about = MediaItem(
                index=each.index, modality=Modality.IMAGE, content_hash="", of=of, grid=grid, rows=each.rows
            )
            encode = Encode(
                request=question.request, attempt=question.attempt, item=about,
                slot=slot, notify=granted.notify, budget_s=question.budget_s,
            )  # fmt: skip
            self.pictures.send(encode, [media[place] if media else picture(each.rows, place + 1)])
        return granted

    async def answer(self, question: Question) -> list[int]:
        self.ask(question)
        await self.show(question)
        end = await self.gateway.outcome(question.name, question.attempt)
        assert isinstance(end, Finished), end
        return self.gateway.tokens(question.name, question.attempt)

    async def idle(self) -> None:
        """Nothing in flight in any half, and everything free."""
        await until(lambda: self.service.pulse().inflight == 0)
        pulse = self.service.pulse()
        assert pulse.free_pages == pulse.total_pages
        self.service._language.check()


@asynccontextmanager
async def mono(tower: ToyTower | None = None) -> AsyncIterator[Scene]:
    tower = tower or ToyTower()
    async with world() as stage:
        engine = FakeEngine(KvPool(LAYOUT, SETUP.pages))
        service = made(stage, engine, tower)
        try:
            endpoints = await service.start(lambda *_: None)
            yield connected(stage, service, engine, tower, endpoints)
        finally:
            engine.let_go()
            await service.close()


def made(stage: World, engine: FakeEngine, tower: ToyTower) -> MonoService:
    parts = Parts(engine=lambda *_: Loaded(engine, engine.kv, WIDTH), transport=NATIVE.transport)

    def encoder(spec: RankSpec, beside: Machine) -> EncoderService:
        return EncoderService(spec, load=tower.load, canary=toy_canary, beside=beside)

    return MonoService(stage.spec(Stage.MONO, SETUP), parts, encoder)


def connected(stage: World, service: MonoService, engine: FakeEngine, tower: ToyTower, endpoints: Endpoints) -> Scene:
    assert endpoints.encode is not None
    gateway, encoded = Gateway(stage), Facts()
    peer = peer_of(Stage.MONO, 1, endpoints)
    link = gateway.to(Rank(service._language, engine, peer))
    pictures = stage.link(endpoints.encode, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, encoded.add)
    return Scene(service, engine, tower, endpoints, gateway, link, pictures, encoded)


@pytest.mark.parametrize("question", [Question(), asked(3), asked(4, 1, 5)], ids=["text", "one", "three"])
def test_answers_as_the_engine_does_by_itself(question: Question) -> None:
    async def scene() -> None:
        async with mono() as rank:
            assert await rank.answer(question) == alone(question)
            await rank.encoded.count(len(question.items))
            assert {type(end) for end in rank.encoded.seen} <= {Encoded}
            await rank.idle()

    run(scene())


def test_only_the_two_inboxes_are_sockets() -> None:
    """Embeddings and what the halves tell each other stay in the process."""

    async def scene() -> None:
        async with mono() as rank:
            await rank.answer(asked(3))
            directory = Path(str(rank.endpoints.inbox).removeprefix("ipc://")).parent
            assert sorted(os.listdir(directory)) == ["mono-0.1.encode", "mono-0.1.inbox"]

    run(scene())


def test_tower_and_engine_take_turns_on_one_thread() -> None:
    turns: list[int] = []

    def note() -> None:
        turns.append(threading.get_ident())

    class NotingEngine(FakeEngine):
        def step(self) -> list[object]:  # type: ignore[override]
            note()
            return list(super().step())

    async def scene() -> None:
        async with world() as stage:
            engine = NotingEngine(KvPool(LAYOUT, SETUP.pages))
            service = made(stage, engine, tower := ToyTower(began=note))
            endpoints = await service.start(lambda *_: None)
            try:
                await connected(stage, service, engine, tower, endpoints).answer(asked(2))
            finally:
                await service.close()

    run(scene())
    assert len(turns) > 1
    assert len(set(turns)) == 1


def test_a_picture_under_way_counts_like_a_request() -> None:
    gate = threading.Event()

    async def scene() -> None:
        async with mono(ToyTower(gate=gate)) as rank:
            rank.ask(asked(3))
            await rank.show(asked(3))
            await until(lambda: rank.service.pulse().inflight == 2)
            gate.set()
            await rank.gateway.outcome()
            await rank.idle()

    run(scene())


def test_what_any_of_its_parts_finds_wrong_is_said() -> None:
    async def scene() -> None:
        async with mono(ToyTower()) as rank:
            rank.service._router._media_bytes += 7
            rank.ask(asked(3))
            await rank.show(asked(3))
            await rank.gateway.outcome()
            await rank.idle()
            await until(lambda: rank.service.pulse().inflight == 0)
            assert rank.service.pulse().unhealthy == "with nothing in flight, the bytes of pictures are off"
            rank.service._router._media_bytes -= 7

    run(scene())


def test_a_draining_rank_still_encodes_for_what_it_holds() -> None:
    question = asked(3)

    async def scene() -> None:
        async with mono() as rank:
            rank.ask(question)
            await rank.gateway.hear(Granted)
            drained = asyncio.ensure_future(rank.service.drain())
            rank.ask(late := Question(name="late"))
            refused = await rank.gateway.outcome(late.name)
            assert isinstance(refused, Failed)
            assert refused.kind is FailureKind.RANK_LOST
            assert not drained.done()
            await rank.show(question)
            assert isinstance(await rank.gateway.outcome(), Finished)
            await drained
            assert rank.gateway.tokens() == alone(question)

    run(scene())


def test_an_abort_while_the_tower_works_frees_everything() -> None:
    gate = threading.Event()
    began = threading.Event()

    async def scene() -> None:
        async with mono(ToyTower(gate=gate, began=began.set)) as rank:
            rank.ask(asked(3))
            await rank.show(asked(3))
            await until(began.is_set)
            rank.link.send(Abort(request=asked().request, attempt=1))
            rank.pictures.send(CancelEncode(request=asked().request, attempt=1))
            gate.set()
            await rank.idle()
            again = asked(3, attempt=2)
            assert await rank.answer(again) == alone(again)

    run(scene())


def test_a_rank_that_finds_itself_withdrawn_gives_up_what_both_halves_had() -> None:
    gate = threading.Event()
    began = threading.Event()

    async def scene() -> None:
        async with mono(ToyTower(gate=gate, began=began.set)) as rank:
            rank.service.peers_changed([peer_of(Stage.MONO, 1, rank.endpoints)])
            rank.ask(asked(3))
            await rank.show(asked(3))
            await until(began.is_set)
            rank.service.peers_changed([])
            assert isinstance(await rank.gateway.outcome(), Failed)
            gate.set()
            await rank.idle()
            again = asked(3, attempt=2)
            assert await rank.answer(again) == alone(again)

    run(scene())


def test_a_torn_picture_is_told_to_the_gateway_and_harms_no_other() -> None:
    good = asked(2, name="good")

    async def scene() -> None:
        async with mono() as rank:
            rank.ask(asked(3))
            await rank.show(asked(3), [b"torn"])
            (end,) = await rank.encoded.count(1)
            assert isinstance(end, EncodeFailed)
            assert end.kind is FailureKind.BAD_MEDIA
            assert await rank.answer(good) == alone(good)
            rank.link.send(Abort(request=asked().request, attempt=1))
            await rank.idle()

    run(scene())


def test_a_capture_counts_the_batches_of_the_tower_and_the_steps_of_the_engine(tmp_path: Path) -> None:
    """This request is one batch and two steps: were it two recordings, none would come to three."""
    path = tmp_path / "trace.json"

    async def scene() -> None:
        loop, written = asyncio.get_running_loop(), asyncio.Event()
        ends: list[Recorded] = []

        def note(recorded: Recorded) -> None:
            ends.append(recorded)
            loop.call_soon_threadsafe(written.set)

        async with mono() as rank:
            rank.service.start_capture(str(path), 3, note)
            question = asked(2, max_tokens=1)
            assert await rank.answer(question) == alone(question)
            assert (len(rank.tower.batches), rank.engine.steps) == (1, 2)
            await written.wait()
        assert ends == [Recorded()]
        assert path.stat().st_size > 0

    run(scene())


def test_a_tower_that_does_not_load_leaves_no_thread() -> None:
    class NoTower(ToyTower):
        def load(self, model: ModelConfig, device: torch.device) -> ToyTower:
            raise LoadError("visual.blocks.0 is missing")

    async def scene() -> None:
        async with world() as stage:
            before = set(threading.enumerate())
            service = made(stage, FakeEngine(KvPool(LAYOUT, SETUP.pages)), NoTower())
            with pytest.raises(LoadError, match="is missing"):
                await service.start(lambda *_: None)
            await service.close()
            assert set(threading.enumerate()) <= before

    run(scene())


def test_loading_says_which_model_it_is_at() -> None:
    phases: list[str] = []

    async def scene() -> None:
        async with world() as stage:
            service = made(stage, FakeEngine(KvPool(LAYOUT, SETUP.pages)), ToyTower())
            await service.start(lambda phase, _done, _total: phases.append(phase))
            await service.close()

    run(scene())
    assert "tower weights" in phases
