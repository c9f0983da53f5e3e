"""An encoder rank: media in, embeddings straight into the slots of the rank that waits for them.

An item is one task from arrival to answer; cancelling it is cancelling the task. Preprocessing runs on a few threads,
the forward on one. Nothing here knows a request: batches are formed from whatever waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, assert_never

import torch

from epdctl.encoder.canary import Canary, Watch, model_canary
from epdctl.encoder.captures import naming_the_cache
from epdctl.encoder.forward import Forward, NotFinite
from epdctl.encoder.making import Makings, Reading, Refused, Size
from epdctl.encoder.notices import Notices
from epdctl.engine.api import Prepared, Tower, WarmsUp
from epdctl.engine.loading import load_tower
from epdctl.errors import DeadlineExceeded, PeerGone, RequestError, TransferError
from epdctl.ids import READERS, Stage
from epdctl.rank.compute import ComputeThread
from epdctl.rank.device import prepare_device
from epdctl.rank.facts import facts_of
from epdctl.rank.greeting import greet
from epdctl.rank.idle import IdleCheck
from epdctl.rank.machine import Machine
from epdctl.rank.peers import PeerTable, Place
from epdctl.rank.profile import Profiler
from epdctl.rank.service import Progress, Proof, Pulse, Recorded, Written
from epdctl.rank.tasks import Tasks
from epdctl.telemetry.hops import Hops, Way
from epdctl.transfer.base import Transport
from epdctl.transfer.landing import payload
from epdctl.transfer.open import open_transport
from epdctl.transfer.tensors import as_bytes, spec_of, spread
from epdctl.wire.config import ModelConfig, RankSpec
from epdctl.wire.encode import (
    ROUTER_TO_WORKER,
    WORKER_TO_ROUTER,
    CancelItem,
    EmbeddingLanded,
    Encode,
    EncodeItem,
    FailureKind,
    ItemEncoded,
    ItemFailed,
    ItemSized,
    MediaItem,
    Profiled,
    Prove,
    Proved,
    RouterToWorker,
    Source,
    StartProfile,
    StopProfile,
    WorkerToRouter,
)
from epdctl.wire.lifecycle import Embeddings, Endpoints, Facts, Peer
from epdctl.wire.sockets import MAX_FRAME_BYTES, Inbox, Sender
from epdctl.wire.trace import Kind
from epdctl.wire.transfer import RemoteLease, TensorSpec

__all__ = ["EncoderService", "LoadTower"]

log = logging.getLogger(__name__)


class LoadTower(Protocol):
    def __call__(self, model: ModelConfig, device: torch.device) -> Tower: ...


@dataclass(frozen=True, slots=True)
class _Work:
    """One dispatch of one item."""

    router: Sender
    dispatch: int
    job: Encode
    media: memoryview
    way: Way


class _Answer:
    """The last word on one dispatch; ``frame``: its embedding, where it travels with the word."""

    def __init__(self, message: WorkerToRouter, *frames: memoryview) -> None:
        self.message = message
        self.frames = frames


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What there is once ``start`` has returned."""

    tower: Tower
    forward: Forward
    makings: Makings
    watch: Watch
    profiler: Profiler
    transport: Transport
    inbox: Inbox[RouterToWorker]


class EncoderService:
    """A Service. ``load``: where its tower comes from; ``canary``: what it proves itself with.

    ``beside``: the language model in the same process, whose compute thread and profiler it uses and leaves alone.
    """

    def __init__(
        self,
        spec: RankSpec,
        *,
        load: LoadTower = load_tower,
        canary: Callable[[ModelConfig], Canary] = model_canary,
        beside: Machine | None = None,
    ) -> None:
        self._spec = spec
        self.hops = Hops()
        self._load = load
        self._canary = canary
        self._beside = beside
        self._compute = ComputeThread() if beside is None else beside.compute
        self._preprocessing = ThreadPoolExecutor(spec.config.encoder.preprocess_threads, "preprocess")
        self._short = ThreadPoolExecutor(1, "short")  # what must not wait behind whole videos
        self._tasks = Tasks()
        self._notices = Notices()
        self._peers = PeerTable()
        self._place = Place(spec.rank, spec.incarnation)
        self._loaded: _Loaded | None = None
        self._items: dict[int, asyncio.Task[None]] = {}
        self._epochs: dict[int, int] = {}  # of each item's dispatch
        self._completed = 0
        self._draining = False
        self._invariants = IdleCheck(lambda: self._here.makings.cache.check())
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self, progress: Progress) -> Endpoints:
        progress("weights", 0, 1)
        tower = await self._compute.run(self._load_tower)
        progress("weights", 1, 1)
        if isinstance(tower, WarmsUp):
            warm_up = tower.warm_up
            await self._compute.run(lambda: warm_up(lambda done, total: progress("kernels", done, total)))
        profiler = Profiler(self._compute, "batch") if self._beside is None else self._beside.profiler
        forward = Forward(tower, self._compute, profiler, self._spec.config.encoder.batch_patches)
        config = self._spec.config.encoder
        makings = Makings(self._prepared, forward.encode, self._tasks, config)
        watch = Watch(self._measure, lambda: forward.made, config, spoilt=lambda: forward.spoilt)
        transport = open_transport(self._spec.config.transfer, self._spec)
        inbox = Inbox(self._spec.endpoint("inbox"), ROUTER_TO_WORKER, self._arrived)
        self._loaded = _Loaded(tower, forward, makings, watch, profiler, transport, inbox)
        self._tasks.start(forward.run(), "forward")
        await watch.calibrate()
        progress("canary", 1, 1)
        self._tasks.start(watch.run(), "canary")
        return Endpoints(inbox=inbox.endpoint, transfer=transport.endpoint)

    def facts(self) -> Facts:
        return facts_of(self._spec.config, width=self._here.tower.width)

    @property
    def transfer_note(self) -> str:
        return self._here.transport.note

    def _load_tower(self) -> Tower:
        device = prepare_device(self._spec.config)
        return self._load(self._spec.config.model, device)

    @property
    def _here(self) -> _Loaded:
        assert self._loaded is not None, "used before start"
        return self._loaded

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        changes = self._peers.replace(peers)
        for peer in changes.left:
            self._forget(peer)
        for peer in changes.joined:
            if peer.stage in READERS[Stage.ENCODER]:
                self._tasks.start(greet(self._here.transport, peer), f"greeting of {peer.rank}")
        if self._place.lost(peers):  # the router gave our items to others, who write to the same slots
            self._give_up([dispatch for dispatch in self._items if self._place.over(self._epochs[dispatch])])

    def _give_up(self, dispatches: Sequence[int]) -> None:
        for dispatch in dispatches:
            self._cancel(dispatch)

    def _cancel(self, dispatch: int) -> None:
        """Its place is free at once: whoever gave the item up may have sent the next one already."""
        if (task := self._items.pop(dispatch, None)) is not None:
            task.cancel()

    def _forget(self, peer: Peer) -> None:
        if peer.stage is Stage.ENCODER_ROUTER:  # nobody is left to answer to; the next router sends its items anew
            self._give_up(list(self._items))
        if peer.endpoints.inbox is not None:
            self._notices.withdraw(peer.endpoints.inbox)
        if peer.endpoints.transfer is not None:
            self._here.transport.withdraw(peer.endpoints.transfer)

    def _arrived(self, router: Sender, message: RouterToWorker, frames: list[memoryview]) -> None:
        match message:
            case EncodeItem(epoch=epoch) if self._place.refuses(epoch):
                log.info("an item came for an epoch that is over")
            case EncodeItem(dispatch=dispatch, job=job, epoch=epoch):
                refusal = self._refusal(frames)
                if refusal is not None:
                    self._tell(router, ItemFailed(dispatch=dispatch, kind=refusal[0], text=refusal[1]))
                elif dispatch not in self._items:
                    self._epochs[dispatch] = epoch
                    way = self.hops.begin(
                        Kind.ENCODE, job.request, "preparing", attempt=job.attempt, item=job.item.index
                    )
                    self._accept(_Work(router, dispatch, job, frames[0], way))
            case CancelItem(dispatch=dispatch):
                self._cancel(dispatch)
            case Prove(number=number):
                self._tasks.start(self._prove(router, number), "proof")
            case StartProfile():
                self._profile(router, message)
            case StopProfile():
                self._here.profiler.stop()
            case _:
                assert_never(message)

    def _refusal(self, frames: list[memoryview]) -> tuple[FailureKind, str] | None:
        if self._draining:
            return FailureKind.NO_RANK, f"{self._spec.rank} is being stopped"
        if len(frames) != 1:
            return FailureKind.INTERNAL, f"an item came with {len(frames)} files"
        if len(self._items) >= self._spec.config.limits.inflight:
            return FailureKind.FULL, f"{self._spec.rank} works on {len(self._items)} items already"
        return None

    def _accept(self, work: _Work) -> None:
        self._idle.clear()
        self._invariants.busy()
        task = self._items[work.dispatch] = self._tasks.start(self._encode(work), f"item {work.dispatch}")
        task.add_done_callback(lambda _: self._ended(work))

    def _ended(self, work: _Work) -> None:
        dispatch = work.dispatch
        work.way.end()
        self._items.pop(dispatch, None)
        self._epochs.pop(dispatch, None)
        self._completed += 1
        if not self._items:
            self._idle.set()

    async def _encode(self, work: _Work) -> None:
        """The whole way of one item. An error that is not listed ends the rank."""
        try:
            async with asyncio.timeout(work.job.budget_s):
                answer = await self._produce(work)
        except Refused as error:
            answer = _failed(work, error.kind, error.message)
        except (TimeoutError, DeadlineExceeded):
            text = f"not encoded within {work.job.budget_s:.1f} s"
            answer = _failed(work, FailureKind.DEADLINE, text)
        except (PeerGone, TransferError) as error:  # the slot's owner went, or gave the slot up
            answer = _failed(work, FailureKind.RANK_LOST, error.message)
        self._items.pop(work.dispatch, None)  # first: the router may send the next one before this task has ended
        self._tell(work.router, answer.message, *answer.frames)

    async def _produce(self, work: _Work) -> _Answer:
        if work.job.slot is None:
            return await self._into_the_answer(work)
        return _Answer(await self._into_slot(work, work.job.slot))

    async def _into_the_answer(self, work: _Work) -> _Answer:
        """For a reader without slots: the bytes go back by way of the router, in one frame."""
        spec = self._spec_of(work.job.item.rows)
        if spec.nbytes > MAX_FRAME_BYTES:
            text = f"{spec.nbytes} bytes of embeddings do not fit an answer, which holds {MAX_FRAME_BYTES}"
            raise Refused(FailureKind.TOO_LARGE, text)
        with self._here.makings.open(work.media, work.job.item) as reading:
            await reading.size()
            work.way.enter("encoding", reading.source.value)
            self._tell(work.router, ItemSized(dispatch=work.dispatch, spec=spec))
            embedding = await reading.embedding()
        work.way.enter("writing")
        _check_shape(embedding, spec)
        loop = asyncio.get_running_loop()
        frame = await loop.run_in_executor(self._short, payload, as_bytes(embedding))
        return _Answer(self._encoded(work, spec, reading), frame)

    async def _into_slot(self, work: _Work, slot: RemoteLease) -> ItemEncoded:
        loop = asyncio.get_running_loop()
        budget = loop.time() + work.job.budget_s
        transport = self._here.transport
        try:
            with self._here.makings.open(work.media, work.job.item) as reading:
                spec = self._sized(slot, await reading.size())
                work.way.enter("encoding", reading.source.value)
                self._tell(work.router, ItemSized(dispatch=work.dispatch, spec=spec))
                await transport.open_slot(slot, seconds=max(0.0, budget - loop.time()))  # while the tower is at work
                embedding = await reading.embedding()
            work.way.enter("writing")
            _check_shape(embedding, spec)
            pieces = spread(as_bytes(embedding), slot.extents)
            await transport.write(slot, pieces, seconds=max(0.0, budget - loop.time()))
        except BaseException:
            transport.drop_slot(slot)
            raise
        self._notices.send(work.job.notify, _landed(work.job, slot, spec))
        return self._encoded(work, spec, reading)

    def _encoded(self, work: _Work, spec: TensorSpec, reading: Reading) -> ItemEncoded:
        kept = self._here.makings.cache.bytes
        return ItemEncoded(dispatch=work.dispatch, spec=spec, source=reading.source, cache_bytes=kept)

    async def prove(self) -> Proof:
        return await self._here.watch.prove()

    async def _prove(self, router: Sender, number: int) -> None:
        proof = await self.prove()
        self._tell(router, Proved(number=number, fault=proof.fault, busy=proof.busy))

    async def _measure(self) -> float:
        """The norm of the canary's embedding, made as every item's is."""
        canary = self._canary(self._spec.config.model)
        prepared = await self._prepared_by(self._short, memoryview(canary.media), canary.item)
        self._here.makings.room.learn(canary.item, prepared.pixels.nbytes)
        try:
            embedding = await self._here.forward.encode(prepared, first=True)
        except NotFinite as error:
            embedding = error.embedding
        return await self._compute.run(lambda: float(torch.linalg.vector_norm(embedding.float())))

    async def _prepared(self, media: memoryview, item: MediaItem) -> Prepared:
        return await self._prepared_by(self._preprocessing, media, item)

    async def _prepared_by(self, threads: ThreadPoolExecutor, media: memoryview, item: MediaItem) -> Prepared:
        """Raises Refused, for one too that is not what the prompt and the slot were made for."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(threads, self._prepare, media, item)
        if (list(prepared.grid), prepared.rows) != (item.grid, item.rows):
            text = f"the {item.modality.noun} makes {prepared.rows} rows of grid {list(prepared.grid)}"
            raise Refused(FailureKind.BAD_MEDIA, f"{text}, and its header promised {item.rows} of {item.grid}")
        return prepared

    def _prepare(self, media: memoryview, item: MediaItem) -> Prepared:
        """On a preprocessing thread. What goes wrong with one picture is that picture's end, not the rank's."""
        try:
            return self._here.tower.prepare(media, item)
        except RequestError as error:
            kind = FailureKind.TOO_LARGE if error.status == 413 else FailureKind.BAD_MEDIA
            raise Refused(kind, error.message) from error
        except MemoryError:
            raise
        except Exception as error:
            log.exception("preprocessing failed for item %d", item.index)
            raise Refused(FailureKind.INTERNAL, f"preprocessing failed: {error}") from error

    def _spec_of(self, rows: int) -> TensorSpec:
        tower = self._here.tower
        dtype = str(tower.dtype).removeprefix("torch.")
        nbytes = rows * tower.width * tower.dtype.itemsize
        return TensorSpec(dtype=dtype, shape=[rows, tower.width], nbytes=nbytes)

    def _sized(self, slot: RemoteLease, size: Size) -> TensorSpec:
        """What will be written, once it is sure that the slot has room for it."""
        spec = self._spec_of(size.rows)
        room = sum(extent.nbytes for extent in slot.extents)
        if spec.nbytes > room:
            raise Refused(FailureKind.INTERNAL, f"{spec.nbytes} bytes of embeddings do not fit a slot of {room}")
        return spec

    def _profile(self, router: Sender, order: StartProfile) -> None:
        loop = asyncio.get_running_loop()

        def written(recorded: Recorded) -> None:
            word = Profiled(path=order.path, error=recorded.error, note=recorded.note)
            loop.call_soon_threadsafe(self._tell, router, word)

        self.start_capture(order.path, order.steps, written)

    def _tell(self, router: Sender, message: WorkerToRouter, *frames: memoryview) -> None:
        try:
            self._here.inbox.reply(router, message, WORKER_TO_ROUTER, frames)
        except PeerGone as error:
            log.info("the router left before its answer: %s", error)

    def pulse(self) -> Pulse:
        """Raises WritesAdrift, which ends the rank."""
        if self._loaded is None:
            return Pulse(standstill=self._compute.job_seconds)
        self._loaded.transport.bound_adrift()
        return Pulse(
            inflight=len(self._items),
            waiting=self._loaded.makings.room.waiting + self._loaded.forward.waiting,
            completed=self._completed,
            standstill=self._compute.job_seconds,
            unhealthy=self._loaded.watch.reason or self._invariants.verdict(idle=not self._items),
            embeddings=self._figures,
        )

    @property
    def _figures(self) -> Embeddings:
        made = self._here.makings
        return Embeddings(
            made=made.counts[Source.MADE],
            shared=made.counts[Source.SHARED],
            cached=made.counts[Source.CACHED],
            kept_bytes=made.cache.bytes,
            prepared_bytes=made.room.held,
            unreadable=self._here.inbox.bad_frames,
        )

    async def until_idle(self) -> None:
        await self._idle.wait()

    async def drain(self) -> None:
        self._draining = True
        await self.until_idle()

    def start_capture(self, path: str, steps: int | None, written: Written) -> None:
        self._here.profiler.start(path, steps, naming_the_cache(self._here.makings, written))

    def stop_capture(self) -> None:
        self._here.profiler.stop()

    async def close(self) -> None:
        await self._tasks.close()
        for threads in (self._preprocessing, self._short):
            threads.shutdown(wait=False, cancel_futures=True)
        self._notices.close()
        if self._loaded is not None:
            self._loaded.inbox.close()
            await self._loaded.transport.close()
        if self._beside is None:
            await self._compute.close(seconds=0.2)


def _failed(work: _Work, kind: FailureKind, text: str) -> _Answer:
    return _Answer(ItemFailed(dispatch=work.dispatch, kind=kind, text=text))


def _check_shape(embedding: torch.Tensor, spec: TensorSpec) -> None:
    if spec_of(embedding) != spec:
        raise Refused(FailureKind.INTERNAL, f"the tower made {list(embedding.shape)}, {spec.shape} was planned")


def _landed(job: Encode, slot: RemoteLease, spec: TensorSpec) -> EmbeddingLanded:
    return EmbeddingLanded(
        request=job.request,
        attempt=job.attempt,
        index=job.item.index,
        lease=slot.lease,
        generation=slot.generation,
        spec=spec,
    )
