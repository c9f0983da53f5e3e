"""The encoder router: takes items from gateways, gives each to an encoder rank, passes on how it ended.

Owns no process and no GPU, imports neither torch nor transformers. A picture's bytes go on as they came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

import msgspec

from epdctl.encoder.dispatch import Dispatcher
from epdctl.encoder.items import Action, Cancel, Ended, ItemKey, ItemState, RankKey, Send
from epdctl.encoder.ranks import Outlook
from epdctl.encoder.verdict import Roster
from epdctl.errors import PeerGone
from epdctl.ids import RankName, Stage
from epdctl.rank.idle import IdleCheck
from epdctl.rank.peers import Links, Place
from epdctl.rank.service import Progress, Pulse
from epdctl.telemetry.hops import Hops, Way
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ROUTER_TO_CLIENT,
    ROUTER_TO_WORKER,
    WORKER_TO_ROUTER,
    CancelEncode,
    CancelItem,
    ClientToRouter,
    Encode,
    Encoded,
    EncodeFailed,
    EncodeItem,
    FailureKind,
    ItemEncoded,
    ItemFailed,
    ItemSized,
    Profiled,
    Prove,
    Proved,
    RankRef,
    RouterToClient,
    RouterToWorker,
    Sized,
    StartProfile,
    StopProfile,
    WorkerToRouter,
)
from epdctl.wire.lifecycle import Absent, Endpoints, Peer
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.trace import Kind
from epdctl.wire.transfer import TensorSpec

__all__ = ["RouterService"]

log = logging.getLogger(__name__)

REMEMBERED = 65_536  # pictures of which it is known where they were encoded last


@dataclass(frozen=True, slots=True)
class _Job:
    """An item's message and its picture, kept until the item ends: it may have to go to another rank."""

    message: Encode
    media: memoryview
    way: Way


class Surface(Protocol):
    """What the router tells its HTTP surface, which is a client of its inbox like any other."""

    @property
    def url(self) -> str: ...

    def encoded(self, by: RankName, message: ItemEncoded) -> None: ...

    def ended(self, end: Ended) -> None: ...

    def profiled(self, by: RankName, message: Profiled) -> None: ...

    def proved(self, by: RankKey, message: Proved) -> None: ...

    def ranks_changed(self) -> None: ...

    def stop_listening(self) -> None: ...

    async def until_idle(self) -> None: ...

    async def close(self) -> None: ...


class RouterService:
    """A Service. Decisions are the Dispatcher's; here they become messages. ``purpose``: of its endpoint."""

    def __init__(self, spec: RankSpec, *, purpose: str = "inbox") -> None:
        limits = spec.config.limits
        self._spec = spec
        self._endpoint = spec.endpoint(purpose)
        self.hops = Hops()
        self._clock = asyncio.get_running_loop().time
        remember = REMEMBERED if spec.config.encoder.cache_bytes else 0
        self._dispatcher = Dispatcher(
            cap=limits.inflight, queue=limits.queue, wait=limits.wait_seconds, remember=remember
        )
        self._outlook: Outlook | None = None
        self._place = Place(spec.rank, spec.incarnation)
        self._jobs: dict[ItemKey, _Job] = {}
        self._media_bytes = 0
        self._completed = 0
        self._draining = False
        self._absent: Sequence[Absent] = ()
        self._invariants = IdleCheck(self.check)
        self._idle = asyncio.Event()
        self._idle.set()
        self._alarm: asyncio.TimerHandle | None = None
        self._inbox: Inbox[ClientToRouter] | None = None
        self._surface: Surface | None = None
        self._encoders: Links[WorkerToRouter, RouterToWorker] = Links(
            WORKER_TO_ROUTER, ROUTER_TO_WORKER, self._answered, stages=frozenset({Stage.ENCODER})
        )
        self._encoders.watch(self._stands)

    async def start(self, progress: Progress) -> Endpoints:
        self._inbox = Inbox(self._endpoint, CLIENT_TO_ROUTER, self._arrived)
        progress("sockets", 1, 1)
        self._surface = await self._open_surface(self._inbox.endpoint)
        return Endpoints(inbox=self._inbox.endpoint, http=None if self._surface is None else self._surface.url)

    async def _open_surface(self, inbox: str) -> Surface | None:
        if self._spec.config.encoder.http is None:
            return None
        from epdctl.encoder.surface import HttpSurface  # HTTP, pictures and numbers: only for those who asked for it

        surface = HttpSurface(self._spec, self, inbox)
        await surface.start()
        return surface

    # -- what the surface asks --

    def ranks(self) -> list[tuple[RankKey, int]]:
        """Those that have items or may get some, with how many each works on."""
        return [(rank, self._dispatcher.pending(rank)) for rank in self._dispatcher.ranks]

    def roster(self) -> Roster:
        resting = [_key(peer) for peer in self._encoders.table if not peer.accepting]
        return Roster(self.ranks(), resting, self._absent)

    def open_ranks(self) -> list[RankKey]:
        return self._dispatcher.open_ranks

    @property
    def waiting(self) -> int:
        return self._dispatcher.waiting

    @property
    def dropped(self) -> Mapping[str, int]:
        """Messages that were not acted on, by why: a rank's word on a dispatch that is over; what nobody can read."""
        bad = self._encoders.bad_frames + (0 if self._inbox is None else self._inbox.bad_frames)
        return {"late": self._dispatcher.late, "unreadable": bad}

    def tell(self, rank: RankKey, message: StartProfile | StopProfile | Prove) -> None:
        """A rank that is gone meanwhile does not answer."""
        self._say(rank, message)

    def absent_changed(self, absent: Sequence[Absent]) -> None:
        """Taken in with the table that comes with it: whoever joins by that one is in neither list until then."""
        self._outlook = _outlook([each for each in absent if each.stage is Stage.ENCODER])
        self._absent = absent

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        changes = self._encoders.peers_changed(peers)
        joined, left = map(_key, changes.joined), map(_key, changes.left)
        resting = [_key(peer) for peer in self._encoders.table if not peer.accepting]
        actions = self._dispatcher.changed(tuple(joined), tuple(left), self._clock(), resting, self._outlook)
        self._apply(actions)
        self._rearm()
        if self._surface is not None:
            self._surface.ranks_changed()
        if self._place.lost(peers):
            self.cut_off()

    def _stands(self, peer: Peer, stands: bool) -> None:
        """A rank that died is cut off first, and withdrawn a moment later; one that is alive is there again soon."""
        change = self._dispatcher.mended if stands else self._dispatcher.cut
        self._apply(change(_key(peer), self._clock()))
        self._rearm()
        if self._surface is not None:
            self._surface.ranks_changed()

    def cut_off(self) -> None:
        """This router had been given up, and with it every item that it was given."""
        self._apply(self._dispatcher.abandon(f"{self._spec.rank} was withdrawn for a while"))

    def _arrived(self, client: Sender, message: ClientToRouter, frames: list[memoryview]) -> None:
        match message:
            case Encode():
                self._submit(client, message, frames)
            case CancelEncode(request=request, attempt=attempt):
                self._apply(self._dispatcher.cancel(client, request, attempt, self._clock()))
            case _:
                assert_never(message)

    def _submit(self, client: Sender, message: Encode, frames: list[memoryview]) -> None:
        key = ItemKey(client, message.request, message.attempt, message.item.index)
        if (refusal := self._refusal(frames)) is not None:
            self._tell(client, _failure(key, *refusal))
        elif key not in self._jobs:
            way = self.hops.begin(Kind.ITEM, key.request, "queued", attempt=key.attempt, item=key.item)
            self._jobs[key] = _Job(message, frames[0], way)
            self._media_bytes += len(frames[0])
            self._invariants.busy()
            self._idle.clear()
            now = self._clock()
            self._apply(self._dispatcher.submit(key, now + message.budget_s, now, message.item.content_hash))
            self._arm(now + min(message.budget_s, self._spec.config.limits.wait_seconds))

    def _refusal(self, frames: list[memoryview]) -> tuple[FailureKind, str] | None:
        if self._draining:
            return FailureKind.RANK_LOST, f"{self._spec.rank} is being stopped"
        if len(frames) != 1:
            return FailureKind.INTERNAL, f"an item came with {len(frames)} pictures"
        limit = self._spec.config.limits.media_bytes
        if self._media_bytes + len(frames[0]) > limit:
            return FailureKind.FULL, f"the pictures under way are {self._media_bytes} bytes; the limit is {limit}"
        return None

    def _answered(self, peer: Peer, message: WorkerToRouter, frames: list[memoryview]) -> None:
        match message:
            case ItemSized():
                self._sized(peer, message)
            case ItemEncoded():
                if self._surface is not None:
                    self._surface.encoded(peer.rank, message)
                now = self._clock()
                self._apply(self._dispatcher.encoded(message.dispatch, _key(peer), now), message.spec, frames)
            case ItemFailed():
                self._failed(_key(peer), message)
            case Profiled():
                if self._surface is not None:
                    self._surface.profiled(peer.rank, message)
            case Proved():
                if self._surface is not None:
                    self._surface.proved(_key(peer), message)
            case _:
                assert_never(message)

    def _failed(self, rank: RankKey, message: ItemFailed) -> None:
        """A rank that has no room, or takes nothing more, says nothing of the item: others may."""
        dispatch, now = message.dispatch, self._clock()
        match message.kind:
            case FailureKind.NO_RANK:
                self._apply(self._dispatcher.refused(dispatch, rank, now))
            case FailureKind.FULL:
                self._apply(self._dispatcher.full(dispatch, rank, now))
            case kind:
                self._apply(self._dispatcher.failed(dispatch, rank, (kind, message.text), now))
        self._rearm()

    def _sized(self, peer: Peer, message: ItemSized) -> None:
        """Passed on where nobody has told the client before what will come."""
        key = self._dispatcher.item_of(message.dispatch, _key(peer))
        if key is not None and self._jobs[key].message.slot is None:
            self._tell(key.client, Sized(request=key.request, attempt=key.attempt, index=key.item, spec=message.spec))

    def _apply(
        self, actions: Sequence[Action], spec: TensorSpec | None = None, frames: Sequence[memoryview] = ()
    ) -> None:
        """``spec``, ``frames``: of the item that one of them says is encoded."""
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Cancel(to=to, dispatch=dispatch):
                    self._say(to, CancelItem(dispatch=dispatch))
                case Ended():
                    self._end(action, spec, frames)
                case _:
                    assert_never(action)

    def _send(self, action: Send) -> None:
        job = self._jobs[action.item]
        job.way.enter("dispatched", f"to {action.to.rank}")
        message = msgspec.structs.replace(job.message, budget_s=action.seconds)
        peer = self._encoders.table.find(action.to.rank, action.to.incarnation)
        epoch = 0 if peer is None else peer.epoch
        self._say(action.to, EncodeItem(dispatch=action.dispatch, job=message, epoch=epoch), job.media)

    def _say(self, to: RankKey, message: RouterToWorker, *frames: memoryview) -> None:
        """A rank that cannot be reached is one that will be withdrawn; its items move then, or run out of time."""
        peer = self._encoders.table.find(to.rank, to.incarnation)
        if peer is None:
            return
        try:
            self._encoders.send(peer, message, frames)
        except PeerGone as error:
            log.warning("%s was not reached: %s", to.rank, error)

    def _end(self, end: Ended, spec: TensorSpec | None, frames: Sequence[memoryview]) -> None:
        key = end.item
        if self._surface is not None:
            self._surface.ended(end)
        job = self._jobs.pop(key)
        job.way.end()
        self._media_bytes -= len(job.media)
        self._completed += 1
        if not self._jobs:
            self._idle.set()
        if end.state is ItemState.ENCODED and end.by is not None:
            told = self._tell(key.client, _success(key, end.by, spec), *frames)
            (self._dispatcher.delivered if told else self._dispatcher.undeliverable)(key)
        elif end.kind is not None:
            self._tell(key.client, _failure(key, end.kind, end.text, end.lost))

    def _tell(self, client: Sender, message: RouterToClient, *frames: memoryview) -> bool:
        if self._inbox is None:
            return False
        try:
            self._inbox.reply(client, message, ROUTER_TO_CLIENT, frames)
        except PeerGone as error:
            log.info("a client left before its answer: %s", error)
            return False
        return True

    def _arm(self, deadline: float) -> None:
        """Wake up by then. The alarm of an item that has ended is left to ring in vain: moving it with every item cost
        more than the item's own decision.
        """
        if self._alarm is not None and self._alarm.when() <= deadline:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._apply(self._dispatcher.tick(self._clock()))
        self._rearm()

    def _rearm(self) -> None:
        if (deadline := self._dispatcher.next_deadline()) is not None:
            self._arm(deadline)

    def pulse(self) -> Pulse:
        return Pulse(
            inflight=len(self._dispatcher),
            waiting=self.waiting,
            completed=self._completed,
            unhealthy=self._invariants.verdict(idle=not self._jobs),
        )

    def check(self) -> None:
        """Raises AssertionError where an item or its picture is held by nobody, or twice."""
        self._dispatcher.check()
        assert self._media_bytes == sum(len(job.media) for job in self._jobs.values()), "the bytes of pictures are off"

    async def until_idle(self) -> None:
        await self._idle.wait()

    async def drain(self) -> None:
        self._draining = True
        if self._surface is not None:
            self._surface.stop_listening()
        await self.until_idle()
        if self._surface is not None:  # embeddings are on their way to readers
            await self._surface.until_idle()

    async def close(self) -> None:
        if self._surface is not None:
            await self._surface.close()
        if self._alarm is not None:
            self._alarm.cancel()
        self._encoders.close()
        if self._inbox is not None:
            self._inbox.close()


def _key(peer: Peer) -> RankKey:
    return RankKey(peer.rank, peer.incarnation)


def _outlook(absent: Sequence[Absent]) -> Outlook:
    coming = frozenset(each.rank for each in absent if not each.hopeless)
    return Outlook(coming, "; ".join(f"{each.rank} is {each.hopeless}" for each in absent if each.hopeless))


def _success(key: ItemKey, by: RankKey, spec: TensorSpec | None) -> Encoded:
    return Encoded(
        request=key.request,
        attempt=key.attempt,
        index=key.item,
        by=by.rank,
        incarnation=by.incarnation,
        spec=spec,
    )


def _failure(key: ItemKey, kind: FailureKind, text: str, lost: Sequence[RankKey] = ()) -> EncodeFailed:
    on = [RankRef(rank=rank, incarnation=incarnation) for rank, incarnation in lost]
    return EncodeFailed(request=key.request, attempt=key.attempt, index=key.item, kind=kind, text=text, lost=on)
