"""The prefill rank: computes prompts in chunks, and writes their KV into decode's pages while the next chunk runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from epdctl.engine.api import Advance
from epdctl.errors import PeerGone, TransferError, WireError
from epdctl.ids import READERS, Room, Stage
from epdctl.prefill.handoff import Offer, Outgoing, misfit, stretches, why_not_written
from epdctl.rank.admission import Refusal
from epdctl.rank.greeting import greet
from epdctl.rank.machine import NATIVE, Parts
from epdctl.rank.peers import Changes
from epdctl.rank.prompts import PromptRank, PromptStay, fault
from epdctl.rank.sequences import Phase, User
from epdctl.rank.tasks import Tasks
from epdctl.transfer.base import Piece
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import EmbeddingLanded, FailureKind
from epdctl.wire.lifecycle import Peer
from epdctl.wire.serve import (
    PREFILL_TO_DECODE,
    TO_PREFILL,
    Abort,
    KvFailed,
    KvLease,
    KvReady,
    KvWithdrawn,
    Likelihood,
    Prefill,
    PrefillToDecode,
    RankRef,
    ToPrefill,
)
from epdctl.wire.sockets import Sender
from epdctl.wire.trace import Kind

__all__ = ["PrefillService", "PrefillStay"]

log = logging.getLogger(__name__)

RoomKey = tuple[Room, int]  # room, attempt


@dataclass(slots=True, kw_only=True, eq=False)
class PrefillStay(PromptStay):
    """``offer``: decode's pages, from when it came until decode has been told how it ended.

    ``made``: by its latest chunk, see Transport.
    """

    room: Room
    decode_at: RankRef
    outgoing: Outgoing
    offer: Offer | None = None
    first_token: int | None = None
    likelihood: Likelihood | None = None
    rope_delta: int = 0
    made: object | None = None

    @property
    def room_key(self) -> RoomKey:
        return self.room, self.attempt


@dataclass(frozen=True, slots=True)
class _Early:
    """An offer whose prompt has not come."""

    offer: Offer
    alarm: asyncio.TimerHandle


class PrefillService(PromptRank[PrefillStay, ToPrefill]):
    """Prefill and KvLease, in either order → Granted → EmbeddingLanded… → pages, KvReady."""

    kind = Kind.PREFILL

    def __init__(self, spec: RankSpec, parts: Parts = NATIVE) -> None:
        super().__init__(spec, TO_PREFILL, parts)
        self._rooms: dict[RoomKey, PrefillStay] = {}
        self._early: dict[RoomKey, _Early] = {}
        self._writes = Tasks()

    def _received(self, sender: Sender, message: ToPrefill, _: list[memoryview]) -> None:
        match message:
            case Prefill():
                self._prefill(sender, message)
            case KvLease():
                self._offered(Offer(sender, message))
            case EmbeddingLanded():
                self._landed(message)
            case KvWithdrawn():
                self._withdrawn(message)
            case Abort():
                self._abort(message)
            case _:
                assert_never(message)

    # -- the two halves of a room --

    def _prefill(self, sender: Sender, message: Prefill) -> None:
        stay = self._stay(sender, message)
        early = self._early.pop(stay.room_key, None)
        if early is not None:
            early.alarm.cancel()
            stay.offer = early.offer
        if not self._enter(stay):
            self._tell_decode(stay, Refusal(FailureKind.RANK_LOST, f"{self._spec.rank} does not take this prompt"))
            return
        self._rooms[stay.room_key] = stay
        if (refusal := fault(message) or self._crowd()) is not None:
            self._end(stay, refusal)
        elif stay.offer is not None:
            self._pair(stay, stay.offer)

    def _stay(self, sender: Sender, message: Prefill) -> PrefillStay:
        return PrefillStay(
            request=message.request,
            attempt=message.attempt,
            epoch=message.epoch,
            sender=sender,
            need=self._need(message, 0),
            prompt_tokens=len(message.tokens),
            ends_at=self._loop.time() + message.budget_s,
            tokens=message.tokens,
            items=message.items,
            sampling=message.sampling,
            answer_tokens=1,
            missing={item.index for item in message.items},
            room=message.room,
            decode_at=message.decode_at,
            outgoing=Outgoing(len(message.tokens), self.machine.page_size),
        )

    def _crowd(self) -> Refusal | None:
        """Prompts that wait for decode's pages are bounded like those that wait for ours."""
        alone = sum(stay.offer is None for stay in self._rooms.values())
        if alone <= self._limits.queue:
            return None
        return Refusal(FailureKind.FULL, f"{alone - 1} prompts wait for pages of decode (limits.queue)")

    def _offered(self, offer: Offer) -> None:
        key = offer.kv.room, offer.kv.attempt
        stay = self._rooms.get(key)
        if stay is not None and stay.offer is None and stay.phase is Phase.WAITING:
            self._pair(stay, offer)
        elif (closed := self._closed(offer.kv.epoch)) is not None:
            self._refuse(offer, closed)
        elif len(self._early) >= self._limits.queue:
            self._refuse(offer, Refusal(FailureKind.FULL, f"{len(self._early)} rooms wait for their prompts"))
        elif stay is not None or key in self._early:
            log.warning("a second lease for the room of %s was dropped", offer.kv.request)
        else:
            alarm = self._loop.call_later(self._limits.request_seconds, self._promptless, key)
            self._early[key] = _Early(offer, alarm)

    def _promptless(self, key: RoomKey) -> None:
        early = self._early.pop(key)
        text = f"no prompt came to {self._spec.rank} within {self._limits.request_seconds:.0f} s"
        self._refuse(early.offer, Refusal(FailureKind.DEADLINE, text))

    def _pair(self, stay: PrefillStay, offer: Offer) -> None:
        stay.offer = offer
        refusal = misfit(self.machine.loaded.kv.layout, offer.kv, stay.outgoing.total)
        if refusal is not None:
            self._end(stay, refusal)
        else:
            self._queue(stay)

    def _withdrawn(self, message: KvWithdrawn) -> None:
        """Decode gave the room up, and has told the gateway why if the gateway does not know."""
        key = message.room, message.attempt
        early = self._early.pop(key, None)
        if early is not None:
            early.alarm.cancel()
        stay = self._rooms.get(key)
        if stay is not None:
            stay.offer = None
            self._end(stay)

    # -- pages --

    def _advanced(self, stay: PrefillStay, advance: Advance, made: object | None) -> None:
        stay.rope_delta = advance.rope_delta
        stay.outgoing.computed(advance.computed)
        stay.made = made
        if advance.prompt_done:
            stay.first_token = advance.token
            stay.likelihood = advance.likelihood
            self._prompt_done(stay)
        self._write_on(stay)

    def _write_on(self, stay: PrefillStay) -> None:
        """Keep one write of this room under way while there is something to write."""
        if User.WRITES not in stay.users and stay.outgoing.due() and stay.offer is not None:
            stay.users.add(User.WRITES)
            self._writes.start(self._write(stay, stay.offer.kv), f"handoff of {stay.name}")

    async def _write(self, stay: PrefillStay, kv: KvLease) -> None:
        way = self.hops.begin(Kind.WRITE, stay.request, "writing", attempt=stay.attempt)
        try:
            while not stay.over and (due := stay.outgoing.due()):
                pieces, seconds = self._pieces(stay, due), self._left(stay)
                await self.machine.transport.write(kv.lease, pieces, seconds=seconds, made=stay.made)
                stay.outgoing.sent = due.stop
        except (TransferError, WireError) as error:
            self._end(stay, why_not_written(error, kv.lease.pool.owner))
        finally:
            way.end()
            self._let_go(stay, User.WRITES)
        self._hand_over(stay)

    def _pieces(self, stay: PrefillStay, due: range) -> list[Piece]:
        assert stay.offer is not None, "pages go to whoever offered theirs"
        kv, extents = self.machine.loaded.kv, stay.offer.kv.lease.extents
        return [
            Piece(kv.memory[way.source : way.source + way.nbytes], way.extent, way.offset)
            for way in stretches(stay.holding().pages, due, extents, kv.layout.page_bytes)
        ]

    def _hand_over(self, stay: PrefillStay) -> None:
        if stay.over or stay.first_token is None or not stay.outgoing.done or stay.offer is None:
            return
        offer, stay.offer = stay.offer, None
        ready = KvReady(
            room=stay.room,
            attempt=stay.attempt,
            first_token=stay.first_token,
            rope_delta=stay.rope_delta,
            likelihood=stay.likelihood,
        )
        self._say(offer, ready)
        self._end(stay)

    # -- the end --

    def _leaving(self, stay: PrefillStay, refusal: Refusal | None) -> None:
        self._rooms.pop(stay.room_key, None)
        self._tell_decode(stay, refusal or Refusal(FailureKind.RANK_LOST, f"{self._spec.rank} gave the room up"))

    def _tell_decode(self, stay: PrefillStay, refusal: Refusal) -> None:
        if stay.offer is not None:
            offer, stay.offer = stay.offer, None
            self._refuse(offer, refusal)

    def _refuse(self, offer: Offer, refusal: Refusal) -> None:
        kv = offer.kv
        self._say(offer, KvFailed(room=kv.room, attempt=kv.attempt, kind=refusal.kind, text=refusal.text))

    def _say(self, offer: Offer, message: PrefillToDecode) -> None:
        try:
            self.inbox.reply(offer.sender, message, PREFILL_TO_DECODE)
        except PeerGone as error:  # the gateway learns it from the table of peers, as we do
            log.warning("%s is gone before it heard of its room: %s", offer.kv.lease.pool.owner, error)

    def _doing(self, stay: PrefillStay) -> str:
        if stay.phase is Phase.WAITING and stay.offer is None:
            return f"waiting for pages of {stay.decode_at.rank}"
        if stay.phase is Phase.GRANTED:
            return f"waiting for {len(stay.missing)} embeddings"
        return super()._doing(stay)

    def _peers(self, peers: Sequence[Peer], changes: Changes) -> None:
        for peer in changes.left:
            self._decode_lost(peer)
        for peer in changes.joined:
            if peer.stage in READERS[Stage.PREFILL]:
                self._writes.start(greet(self.machine.transport, peer), f"greeting of {peer.rank}")

    def _decode_lost(self, peer: Peer) -> None:
        """It may only have been withdrawn: its link to us stands, and its pages wait for what we say."""
        gone = Refusal(FailureKind.RANK_LOST, f"{peer.rank} went away before it had the prompt")
        for stay in list(self._rooms.values()):
            if (stay.decode_at.rank, stay.decode_at.incarnation) == (peer.rank, peer.incarnation):
                self._end(stay, gone)
        for key, early in list(self._early.items()):
            pool = early.offer.kv.lease.pool
            if (pool.owner, pool.incarnation) == (peer.rank, peer.incarnation):
                self._send_back(key, gone)

    def _send_back(self, key: RoomKey, refusal: Refusal) -> None:
        """An offer whose prompt will not come."""
        early = self._early.pop(key)
        early.alarm.cancel()
        self._refuse(early.offer, refusal)

    def cut_off(self) -> None:
        for key, early in list(self._early.items()):
            if self._place.over(early.offer.kv.epoch):
                self._send_back(key, self._given_up)
        super().cut_off()

    async def drain(self) -> None:
        self._draining = True
        for key in list(self._early):
            self._send_back(key, Refusal(FailureKind.RANK_LOST, f"{self._spec.rank} is draining"))
        await super().drain()

    async def close(self) -> None:
        for early in self._early.values():
            early.alarm.cancel()
        await self._writes.close()
        await super().close()

    def check(self) -> None:
        super().check()
        assert len(self._rooms) == sum(not stay.over for stay in self._stays.values()), "a room without a stay"
