"""Ranks with a language model in one event loop, without a model: an engine whose tokens depend on every byte of KV.

A gateway and an encoder of the test's own speak to them over real sockets.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from epdctl.decode.language import LanguageService
from epdctl.decode.service import DecodeService
from epdctl.engine.api import Advance, NewSequence
from epdctl.engine.kv import KvPool, Memory
from epdctl.ids import Incarnation, Modality, RankName, RequestId, Room, RunId, Stage
from epdctl.prefill.service import PrefillService
from epdctl.rank.language import LanguageRank
from epdctl.rank.machine import Loaded, Parts
from epdctl.rank.service import Progress
from epdctl.transfer.base import Transport
from epdctl.transfer.landing import Owner
from epdctl.transfer.memory import Exchange, MemoryTransport
from epdctl.transfer.open import open_transport
from epdctl.transfer.tensors import as_bytes, spec_of, spread
from epdctl.wire.config import EngineConfig, Limits, ModelConfig, RankConfig, RankSpec, TransferConfig
from epdctl.wire.encode import ENCODER_TO_LANGUAGE, EmbeddingLanded
from epdctl.wire.lifecycle import Endpoints, Peer
from epdctl.wire.message import Codec
from epdctl.wire.serve import (
    RANK_TO_GATEWAY,
    TO_DECODE,
    TO_LANGUAGE,
    TO_PREFILL,
    Abort,
    Decode,
    Failed,
    Finished,
    FinishReason,
    Generate,
    Granted,
    KvLayout,
    Prefill,
    PromptItem,
    RankRef,
    RankToGateway,
    Sampling,
    Token,
)
from epdctl.wire.sockets import Link
from tests.support.halfway import Halfway
from tests.support.ranks import News

GUARD_SECONDS = 60.0
WIDTH = 4
VOCABULARY = 1009
PAGE = 4
LAYOUT = KvLayout(page_size=PAGE, layers=2, kv_heads=1, head_dim=2, dtype="float32")


class FakeEngine:
    """What a sequence says next is a hash of the KV of all its tokens, read from the pages: a lost page shows.

    ``gate``: when held, a step waits inside, on the compute thread, until it is let through.
    """

    def __init__(self, kv: KvPool, chunk: int = 6) -> None:
        self.kv = kv
        self.chunk = chunk
        self.steps = 0
        self.inside = threading.Event()
        self.fail_with: BaseException | None = None
        self._gate = threading.Semaphore(0)
        self._held = False
        self._sequences: dict[str, _Running] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def hold(self) -> None:
        self._held = True

    def step_once(self) -> None:
        """Let one held step through."""
        self._gate.release()

    def let_go(self) -> None:
        self._held = False
        self._gate.release(1000)

    def admit(self, new: NewSequence) -> None:
        assert new.id not in self._sequences
        assert len(new.pages) * PAGE >= len(new.tokens) + new.max_new_tokens - 1
        self._sequences[new.id] = _Running(new, list(new.tokens), new.computed, new.rope_delta or len(new.items))

    def abort(self, sequence: str) -> None:
        self._sequences.pop(sequence, None)

    def step(self) -> list[Advance]:
        self.inside.set()
        if self._held:
            assert self._gate.acquire(timeout=GUARD_SECONDS), "nobody let the engine through its gate"
        if self.fail_with is not None:
            raise self.fail_with
        self.steps += 1
        return [self._advance(running) for running in list(self._sequences.values())]

    def check(self) -> None:
        assert not self._sequences

    def _advance(self, running: _Running) -> Advance:
        new = running.new
        end = min(len(running.tokens), running.computed + self.chunk)
        for position in range(running.computed, end):
            self._write(new, position, running.value(position))
        running.computed = end
        token, finished = None, None
        if end == len(running.tokens):
            token = self._next(new, end, running.delta)
            running.tokens.append(token)
            finished = running.finished(token)
            if finished is not None:
                del self._sequences[new.id]
        done = running.computed >= len(new.tokens)
        return Advance(new.id, running.computed, done, token, finished, running.delta)

    def _write(self, new: NewSequence, position: int, value: float) -> None:
        self.kv.view[new.pages[position // PAGE], :, :, position % PAGE] = value

    def _next(self, new: NewSequence, length: int, delta: int) -> int:
        total = delta
        for position in range(length):
            cell = self.kv.view[new.pages[position // PAGE], :, :, position % PAGE]
            assert cell.min() == cell.max(), "half a page arrived"
            total = (total * 31 + int(cell.flatten()[0]) + position) % VOCABULARY
        return total


@dataclass
class _Running:
    new: NewSequence
    tokens: list[int]
    computed: int
    delta: int

    def value(self, position: int) -> float:
        for item in self.new.items:
            if item.offset <= position < item.offset + item.rows:
                return float(self.new.embeddings[item.index][position - item.offset, 0])
        return float(self.tokens[position])

    def finished(self, token: int) -> FinishReason | None:
        if token in self.new.sampling.stop_token_ids:
            return FinishReason.STOP
        sampled = len(self.tokens) - len(self.new.tokens)
        return FinishReason.LENGTH if sampled >= self.new.max_new_tokens else None


def item(index: int, offset: int, rows: int) -> PromptItem:
    return PromptItem(index=index, modality=Modality.IMAGE, grid=[1, 2, 2], offset=offset, rows=rows)


def embedding(of: PromptItem, seed: int = 0) -> torch.Tensor:
    """[rows, WIDTH] of small whole numbers."""
    start = 100 * (of.index + 1) + seed
    return torch.arange(start, start + of.rows * WIDTH, dtype=torch.float32).view(of.rows, WIDTH)


@dataclass(frozen=True)
class Question:
    """One request, as a gateway would ask it."""

    tokens: Sequence[int] = tuple(range(10, 21))
    items: Sequence[PromptItem] = ()
    max_tokens: int = 5
    stop: Sequence[int] = ()
    budget_s: float = GUARD_SECONDS
    name: str = "r1"
    attempt: int = 1
    room: int = 7
    embeddings: Mapping[int, torch.Tensor] = field(default_factory=dict)  # real ones, where there is a real model

    def rows(self, of: PromptItem) -> torch.Tensor:
        return self.embeddings[of.index] if self.embeddings else embedding(of)

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.max_tokens, stop_token_ids=list(self.stop))

    @property
    def request(self) -> RequestId:
        return RequestId(self.name)


def alone(question: Question) -> list[int]:
    """Every token that one engine by itself samples, the end token included."""
    pages = -(-(len(question.tokens) + question.max_tokens) // PAGE)
    engine = FakeEngine(KvPool(LAYOUT, pages))
    engine.admit(
        NewSequence(
            id="alone",
            tokens=question.tokens,
            items=question.items,
            embeddings={each.index: question.rows(each) for each in question.items},
            sampling=question.sampling,
            pages=list(reversed(range(pages))),
            max_new_tokens=question.max_tokens,
        )
    )
    tokens = []
    while engine.has_work:
        tokens += [advance.token for advance in engine.step() if advance.token is not None]
    return tokens


@dataclass
class Rank:
    """One service, its engine, and how peers see it."""

    service: LanguageRank[Any, Any]
    engine: FakeEngine
    peer: Peer

    @property
    def ref(self) -> RankRef:
        return RankRef(rank=self.peer.rank, incarnation=self.peer.incarnation)

    @property
    def inbox(self) -> str:
        assert self.peer.endpoints.inbox is not None
        return self.peer.endpoints.inbox

    @property
    def free_pages(self) -> int:
        return self.service.pulse().free_pages

    async def idle(self) -> None:
        """Nothing in flight, everything free; what was still written to is so when its writer has said its last."""
        await until(lambda: not (pulse := self.service.pulse()).inflight and not pulse.leases)
        pulse = self.service.pulse()
        assert (pulse.free_pages, pulse.unhealthy) == (pulse.total_pages, None)
        self.service.check()


@dataclass
class Setup:
    """What the ranks of one test are like."""

    backend: str = "zmq"
    pages: int = 64
    limits: Limits = field(default_factory=Limits)
    embedding_bytes: int = 1 << 16
    layout: KvLayout = LAYOUT
    loaded: Loaded | None = None  # a real engine in place of the fake one
    checksum: bool = False


SERVICES: dict[Stage, Callable[[RankSpec, Parts], LanguageRank[Any, Any]]] = {
    Stage.PREFILL: PrefillService,
    Stage.DECODE: DecodeService,
    Stage.LANGUAGE: LanguageService,
}


class World:
    """A directory of sockets, the ranks in it, and what they were told of each other."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.exchange = Exchange()
        self.ranks: list[Rank] = []
        self._senders: list[Transport] = []
        self._links: list[Link[Any, Any]] = []

    def spec(self, stage: Stage, setup: Setup, incarnation: int = 1) -> RankSpec:
        rank = RankName.of(stage, 0)
        config = RankConfig(
            rank=rank,
            stage=stage,
            service="",
            model=ModelConfig(path="", name="fake", family="qwen2_5_vl"),
            limits=setup.limits,
            engine=EngineConfig(page_size=PAGE),
            transfer=TransferConfig(
                backend=setup.backend,
                protocol="tcp" if setup.backend == "mooncake" else "",
                embedding_bytes=setup.embedding_bytes,
                checksum=setup.checksum,
            ),
        )
        return RankSpec(
            run=RunId("run"),
            cluster="test",
            incarnation=Incarnation(incarnation),
            token="secret",
            supervisor="",
            sockets=self.directory,
            config=config,
        )

    async def start(self, stage: Stage, setup: Setup, incarnation: int = 1) -> Rank:
        engine = FakeEngine(KvPool(setup.layout, setup.pages))

        def load(_config: RankConfig, _progress: Progress, memory: Memory) -> Loaded:
            if setup.loaded is not None:
                return setup.loaded
            engine.kv = KvPool(setup.layout, setup.pages, memory=memory)
            return Loaded(engine, engine.kv, WIDTH)

        parts = Parts(engine=load, transport=self.transport)
        service = SERVICES[stage](self.spec(stage, setup, incarnation), parts)
        endpoints = await service.start(lambda _phase, _done, _total: None)
        rank = Rank(service, engine, peer_of(stage, incarnation, endpoints))
        self.ranks.append(rank)
        return rank

    def transport(self, spec: RankSpec) -> Transport:
        """Within one process all of a world's ranks share an exchange, which a test may tamper with."""
        if spec.config.transfer.backend == "memory":
            owner = Owner(spec.rank, spec.incarnation, spec.token)
            return MemoryTransport(spec.endpoint("transfer"), owner, self.exchange)
        return open_transport(spec.config.transfer, spec)

    def tell_peers(self, *gone: Rank) -> None:
        peers = [rank.peer for rank in self.ranks if rank not in gone]
        for rank in self.ranks:
            rank.service.peers_changed(peers)

    def describe(self) -> str:
        """Where everybody stands: read when a test hangs."""
        lines = [f"sockets: {sorted(os.listdir(self.directory))}"]
        for rank in self.ranks:
            lines.append(f"{rank.peer.rank}: {rank.service.pulse()}, early {getattr(rank.service, '_early', None)}")
            lines += [f"  {stay}" for stay in rank.service._stays.values()]
        return "\n".join(lines)

    def encoder(self, backend: str) -> Encoder:
        spec = self.spec(Stage.ENCODER, Setup(backend=backend), incarnation=1 + len(self._senders))
        transport = self.transport(spec)
        self._senders.append(transport)
        return Encoder(transport, self)

    def link(self, endpoint: str, incoming: Codec[Any], outgoing: Codec[Any], hear: Callable[[Any], None]) -> Any:
        link: Link[Any, Any] = Link(endpoint, incoming, outgoing, lambda message, _frames: hear(message))
        self._links.append(link)
        return link

    async def close(self) -> None:
        for link in self._links:
            link.close()
        for rank in self.ranks:
            rank.engine.let_go()
            await rank.service.close()
        for transport in self._senders:
            await transport.close()


def peer_of(stage: Stage, incarnation: int, endpoints: Endpoints) -> Peer:
    return Peer(rank=RankName.of(stage, 0), stage=stage, incarnation=Incarnation(incarnation), endpoints=endpoints)


@dataclass
class Encoder:
    transport: Transport
    world: World
    links: dict[str, Link[Any, Any]] = field(default_factory=dict)

    async def deliver(self, question: Question, granted: Granted, which: Sequence[int] | None = None) -> None:
        """Write the embeddings of the items (by place) into their slots, and say so."""
        for place in range(len(question.items)) if which is None else which:
            await self.write(question, granted, place)
            self.announce(question, granted, place)

    async def write(self, question: Question, granted: Granted, place: int) -> None:
        rows = question.rows(question.items[place])
        slot = granted.slots[place]
        await self.transport.write(slot, spread(as_bytes(rows), slot.extents), seconds=GUARD_SECONDS)

    def announce(self, question: Question, granted: Granted, place: int) -> None:
        each = question.items[place]
        self.say(granted, EmbeddingLanded(
            request=question.request, attempt=question.attempt, index=each.index,
            lease=granted.slots[place].lease, generation=granted.slots[place].generation,
            spec=spec_of(question.rows(each)),
        ))  # fmt: skip

    def say(self, granted: Granted, message: EmbeddingLanded) -> None:
        if granted.notify not in self.links:
            codec = ENCODER_TO_LANGUAGE
            self.links[granted.notify] = self.world.link(granted.notify, codec, codec, lambda _: None)
        self.links[granted.notify].send(message)


class Gateway:
    """Speaks to ranks and remembers what they said."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._news = News()
        self.heard: list[RankToGateway] = []

    def _hear(self, message: RankToGateway) -> None:
        self.heard.append(message)
        self._news.tell()

    def to(self, rank: Rank) -> Link[Any, Any]:
        codecs: dict[Stage, Codec[Any]] = {Stage.PREFILL: TO_PREFILL, Stage.DECODE: TO_DECODE}
        codec = codecs.get(rank.peer.stage, TO_LANGUAGE)
        link: Link[Any, Any] = self._world.link(rank.inbox, RANK_TO_GATEWAY, codec, self._hear)
        return link

    async def hear(self, kind: type[T], name: str = "r1", attempt: int = 1) -> T:
        """The first message of this kind about a request."""
        found: list[T] = []

        def look() -> bool:
            found[:] = [m for m in self.about(name, attempt) if isinstance(m, kind)]
            return bool(found)

        await self._news.until(look)
        return found[0]

    async def outcome(self, name: str = "r1", attempt: int = 1) -> Finished | Failed:
        ends: list[Finished | Failed] = []

        def look() -> bool:
            ends[:] = [m for m in self.about(name, attempt) if isinstance(m, Finished | Failed)]
            return bool(ends)

        await self._news.until(look)
        return ends[0]

    def about(self, name: str, attempt: int = 1) -> list[RankToGateway]:
        return [message for message in self.heard if (message.request, message.attempt) == (name, attempt)]

    def tokens(self, name: str = "r1", attempt: int = 1) -> list[int]:
        said = [message for message in self.about(name, attempt) if isinstance(message, Token)]
        assert [message.index for message in said] == list(range(len(said)))
        return [message.token for message in said]


@dataclass
class Pair:
    """A prefill and a decode rank, and a gateway linked to both. ``halfway``: in the way of bytes, where a test is."""

    world: World
    prefill: Rank
    decode: Rank
    gateway: Gateway
    encoder: Encoder
    halfway: Halfway | None = None

    def __post_init__(self) -> None:
        self.to_prefill = self.gateway.to(self.prefill)
        self.to_decode = self.gateway.to(self.decode)

    def send_decode(self, question: Question) -> None:
        self.to_decode.send(Decode(
            request=question.request, attempt=question.attempt, room=Room(question.room),
            prompt_tokens=len(question.tokens), sampling=question.sampling,
            prefill_at=self.prefill.ref, budget_s=question.budget_s,
        ))  # fmt: skip

    def send_prefill(self, question: Question) -> None:
        self.to_prefill.send(Prefill(
            request=question.request, attempt=question.attempt, room=Room(question.room),
            tokens=list(question.tokens), items=list(question.items), sampling=question.sampling,
            decode_at=self.decode.ref, budget_s=question.budget_s,
        ))  # fmt: skip

    def ask(self, question: Question) -> None:
        self.send_decode(question)
        self.send_prefill(question)

    async def answer(self, question: Question) -> list[int]:
        """Ask, deliver the pictures, and return the tokens."""
        self.ask(question)
        granted = await self.gateway.hear(Granted, question.name, question.attempt)
        await self.encoder.deliver(question, granted)
        end = await self.gateway.outcome(question.name, question.attempt)
        assert isinstance(end, Finished), end
        return self.gateway.tokens(question.name, question.attempt)

    def abort(self, question: Question) -> None:
        message = Abort(request=question.request, attempt=question.attempt)
        self.to_prefill.send(message)
        self.to_decode.send(message)

    async def idle(self) -> None:
        await self.prefill.idle()
        await self.decode.idle()


@dataclass
class Single:
    """A language rank and a gateway linked to it."""

    world: World
    rank: Rank
    gateway: Gateway
    encoder: Encoder

    def __post_init__(self) -> None:
        self.link = self.gateway.to(self.rank)

    def ask(self, question: Question) -> None:
        self.link.send(Generate(
            request=question.request, attempt=question.attempt, tokens=list(question.tokens),
            items=list(question.items), sampling=question.sampling, budget_s=question.budget_s,
        ))  # fmt: skip

    def abort(self, question: Question) -> None:
        self.link.send(Abort(request=question.request, attempt=question.attempt))


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    directory = tempfile.mkdtemp(prefix="epd-")
    scene = World(directory)
    try:
        yield scene
    except TimeoutError as error:
        error.add_note(scene.describe())
        raise
    finally:
        await scene.close()
        shutil.rmtree(directory)


@asynccontextmanager
async def pair(prefill: Setup | None = None, decode: Setup | None = None) -> AsyncIterator[Pair]:
    first = prefill or Setup()
    async with world() as scene:
        p = await scene.start(Stage.PREFILL, first)
        d = await scene.start(Stage.DECODE, decode or Setup(backend=first.backend))
        scene.tell_peers()
        yield Pair(scene, p, d, Gateway(scene), scene.encoder(first.backend))


@asynccontextmanager
async def single(setup: Setup | None = None) -> AsyncIterator[Single]:
    async with world() as scene:
        rank = await scene.start(Stage.LANGUAGE, setup or Setup())
        yield Single(scene, rank, Gateway(scene), scene.encoder((setup or Setup()).backend))


async def until(fact: Callable[[], bool]) -> None:
    """Return when ``fact`` holds; the loop runs on meanwhile."""
    async with asyncio.timeout(GUARD_SECONDS):
        while not fact():  # noqa: ASYNC110 - the facts of a service have no events
            await asyncio.sleep(0)


T = TypeVar("T")


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test; an error that nobody handled, on the loop or the compute thread, ends and fails it."""
    unhandled: list[BaseException] = []

    async def watched() -> None:
        task = asyncio.ensure_future(work)

        def fail(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            unhandled.append(context.get("exception") or RuntimeError(str(context)))
            task.cancel()

        asyncio.get_running_loop().set_exception_handler(fail)
        await task

    try:
        asyncio.run(watched())
    except asyncio.CancelledError:
        if not unhandled:
            raise
    if unhandled:
        raise unhandled[0]
