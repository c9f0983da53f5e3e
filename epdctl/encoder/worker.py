"""An encoder rank: pictures in, embeddings straight into the slots of the rank that waits for them.

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

from epdctl.encoder.canary import Canary, Watch, picture_canary
from epdctl.encoder.forward import Forward
from epdctl.encoder.making import Makings, Refused, Size
from epdctl.encoder.notices import Notices
from epdctl.engine.api import Prepared, Tower, WarmsUp
from epdctl.engine.loading import load_tower
from epdctl.errors import DeadlineExceeded, PeerGone, RequestError, TransferError
from epdctl.ids import Stage
from epdctl.rank.compute import ComputeThread
from epdctl.rank.device import prepare_device
from epdctl.rank.machine import Machine
from epdctl.rank.peers import PeerTable, Place
from epdctl.rank.profile import Profiler
from epdctl.rank.service import Progress, Pulse
from epdctl.rank.tasks import Tasks
from epdctl.transfer.base import Transport
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
    RouterToWorker,
    WorkerToRouter,
)
from epdctl.wire.lifecycle import Endpoints, Peer
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.transfer import TensorSpec

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
        canary: Callable[[ModelConfig], Canary] = picture_canary,
        beside: Machine | None = None,
    ) -> None:
        self._spec = spec
        self._load = load
        self._canary = canary
        self._beside = beside
        self._compute = ComputeThread() if beside is None else beside.compute
        self._preprocessing = ThreadPoolExecutor(spec.config.encoder.preprocess_threads, "preprocess")
        self._tasks = Tasks()
        self._notices = Notices()
        self._peers = PeerTable()
        self._place = Place(spec.rank, spec.incarnation)
        self._loaded: _Loaded | None = None
        self._items: dict[int, asyncio.Task[None]] = {}
        self._epochs: dict[int, int] = {}  # of each item's dispatch
        self._completed = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self, progress: Progress) -> Endpoints:
        progress("weights", 0, 1)
        tower = await self._compute.run(self._load_tower)
        progress("weights", 1, 1)
        if isinstance(tower, WarmsUp):
            warm_up = tower.warm_up
            await self._compute.run(lambda: warm_up(lambda done, total: progress("kernels", done, total)))
        profiler = Profiler(self._compute) if self._beside is None else self._beside.profiler
        forward = Forward(tower, self._compute, profiler, self._spec.config.encoder.batch_patches)
        config = self._spec.config.encoder
        makings = Makings(self._prepared, forward.encode, self._tasks, config.cache_bytes)
        watch = Watch(self._measure, lambda: forward.made, config)
        transport = open_transport(self._spec.config.transfer, self._spec)
        inbox = Inbox(self._spec.endpoint("inbox"), ROUTER_TO_WORKER, self._arrived)
        self._loaded = _Loaded(tower, forward, makings, watch, profiler, transport, inbox)
        self._tasks.start(forward.run(), "forward")
        await watch.calibrate()
        progress("canary", 1, 1)
        self._tasks.start(watch.run(), "canary")
        return Endpoints(inbox=inbox.endpoint, transfer=transport.endpoint)

    def _load_tower(self) -> Tower:
        device = prepare_device(self._spec.config)
        return self._load(self._spec.config.model, device)

    @property
    def _here(self) -> _Loaded:
        assert self._loaded is not None, "used before start"
        return self._loaded

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        for peer in self._peers.replace(peers).left:
            self._forget(peer)
        if self._place.lost(peers):  # the router gave our items to others, who write to the same slots
            self._give_up([dispatch for dispatch in self._items if self._place.over(self._epochs[dispatch])])

    def _give_up(self, dispatches: Sequence[int]) -> None:
        for dispatch in dispatches:
            self._items[dispatch].cancel()

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
                    self._accept(_Work(router, dispatch, job, frames[0]))
            case CancelItem(dispatch=dispatch):
                if (task := self._items.get(dispatch)) is not None:
                    task.cancel()
            case _:
                assert_never(message)

    def _refusal(self, frames: list[memoryview]) -> tuple[FailureKind, str] | None:
        if self._draining:
            return FailureKind.NO_RANK, f"{self._spec.rank} is being stopped"
        if len(frames) != 1:
            return FailureKind.INTERNAL, f"an item came with {len(frames)} pictures"
        if len(self._items) >= self._spec.config.limits.inflight:
            return FailureKind.FULL, f"{self._spec.rank} works on {len(self._items)} pictures already"
        return None

    def _accept(self, work: _Work) -> None:
        self._idle.clear()
        task = self._items[work.dispatch] = self._tasks.start(self._encode(work), f"item {work.dispatch}")
        task.add_done_callback(lambda _: self._ended(work.dispatch))

    def _ended(self, dispatch: int) -> None:
        self._items.pop(dispatch, None)
        self._epochs.pop(dispatch, None)
        self._completed += 1
        if not self._items:
            self._idle.set()

    async def _encode(self, work: _Work) -> None:
        """The whole way of one item. An error that is not listed ends the rank."""
        try:
            async with asyncio.timeout(work.job.budget_s):
                answer: WorkerToRouter = await self._produce(work)
        except Refused as error:
            answer = ItemFailed(dispatch=work.dispatch, kind=error.kind, text=error.message)
        except (TimeoutError, DeadlineExceeded):
            text = f"not encoded within {work.job.budget_s:.1f} s"
            answer = ItemFailed(dispatch=work.dispatch, kind=FailureKind.DEADLINE, text=text)
        except (PeerGone, TransferError) as error:  # the slot's owner went, or gave the slot up
            answer = ItemFailed(dispatch=work.dispatch, kind=FailureKind.RANK_LOST, text=error.message)
        self._items.pop(work.dispatch)  # first: the router may send the next one before this task has ended
        self._tell(work.router, answer)

    async def _produce(self, work: _Work) -> ItemEncoded:
        loop = asyncio.get_running_loop()
        budget = loop.time() + work.job.budget_s
        with self._here.makings.open(work.media, work.job.item) as reading:
            spec = self._sized(work, await reading.size())
            self._tell(work.router, ItemSized(dispatch=work.dispatch, spec=spec))
            embedding = await reading.embedding()
        if spec_of(embedding) != spec:
            raise Refused(FailureKind.INTERNAL, f"the tower made {list(embedding.shape)}, {spec.shape} was planned")
        slot = work.job.slot
        pieces = spread(as_bytes(embedding), slot.extents)
        await self._here.transport.write(slot, pieces, seconds=max(0.0, budget - loop.time()))
        self._notices.send(work.job.notify, _landed(work.job, spec))
        kept = self._here.makings.cache.bytes
        return ItemEncoded(dispatch=work.dispatch, spec=spec, source=reading.source, cache_bytes=kept)

    async def _measure(self) -> float:
        """The norm of the canary's embedding, made as every item's is."""
        canary = self._canary(self._spec.config.model)
        embedding = await self._here.forward.encode(await self._prepared(memoryview(canary.media), canary.item))
        return await self._compute.run(lambda: float(torch.linalg.vector_norm(embedding.float())))

    async def _prepared(self, media: memoryview, item: MediaItem) -> Prepared:
        """Raises Refused, for one too that is not what the prompt and the slot were made for."""
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._preprocessing, self._prepare, media, item)
        if (list(prepared.grid), prepared.rows) != (item.grid, item.rows):
            text = f"the picture makes {prepared.rows} rows of grid {list(prepared.grid)}"
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

    def _sized(self, work: _Work, size: Size) -> TensorSpec:
        """What will be written, once it is sure that the slot has room for it."""
        tower = self._here.tower
        dtype = str(tower.dtype).removeprefix("torch.")
        nbytes = size.rows * tower.width * tower.dtype.itemsize
        room = sum(extent.nbytes for extent in work.job.slot.extents)
        if nbytes > room:
            raise Refused(FailureKind.INTERNAL, f"{nbytes} bytes of embeddings do not fit a slot of {room}")
        return TensorSpec(dtype=dtype, shape=[size.rows, tower.width], nbytes=nbytes)

    def _tell(self, router: Sender, message: WorkerToRouter) -> None:
        try:
            self._here.inbox.reply(router, message, WORKER_TO_ROUTER)
        except PeerGone as error:
            log.info("the router left before its answer: %s", error)

    def pulse(self) -> Pulse:
        return Pulse(
            inflight=len(self._items),
            completed=self._completed,
            standstill=self._compute.job_seconds,
            unhealthy=None if self._loaded is None else self._loaded.watch.reason,
        )

    async def drain(self) -> None:
        self._draining = True
        await self._idle.wait()

    def start_capture(self, path: str, steps: int | None, written: Callable[[str | None], None]) -> None:
        self._here.profiler.start(path, steps, written)

    def stop_capture(self) -> None:
        self._here.profiler.stop()

    async def close(self) -> None:
        await self._tasks.close()
        self._preprocessing.shutdown(wait=False, cancel_futures=True)
        self._notices.close()
        if self._loaded is not None:
            self._loaded.inbox.close()
            await self._loaded.transport.close()
        if self._beside is None:
            await self._compute.close(seconds=0.2)


def _landed(job: Encode, spec: TensorSpec) -> EmbeddingLanded:
    return EmbeddingLanded(
        request=job.request,
        attempt=job.attempt,
        index=job.item.index,
        lease=job.slot.lease,
        generation=job.slot.generation,
        spec=spec,
    )
