"""The decode rank: leases pages, waits for a prompt's KV and first token from a prefill rank, and writes the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from epdctl.engine.api import Advance, NewSequence
from epdctl.engine.pages import pages_for
from epdctl.errors import PeerGone, PoolExhausted
from epdctl.ids import Room, Stage
from epdctl.rank.admission import Need, Refusal
from epdctl.rank.language import LanguageRank
from epdctl.rank.machine import NATIVE, Parts
from epdctl.rank.peers import Changes, Links, PeerTable
from epdctl.rank.sequences import Grant, Phase, Stay
from epdctl.transfer.allocators import PageExtents
from epdctl.transfer.leases import SlotState
from epdctl.transfer.pool import Pool
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import FailureKind
from epdctl.wire.lifecycle import Peer
from epdctl.wire.serve import (
    PREFILL_TO_DECODE,
    TO_DECODE,
    TO_PREFILL,
    Abort,
    Decode,
    FinishReason,
    KvFailed,
    KvLease,
    KvReady,
    KvWithdrawn,
    PrefillToDecode,
    RankRef,
    Sampling,
    ToDecode,
    ToPrefill,
)
from epdctl.wire.sockets import Sender
from epdctl.wire.trace import Kind

__all__ = ["DecodeService", "DecodeStay", "find_prefill"]

INTRODUCTION_SECONDS = 2.0  # a prefill rank may be named by a gateway whose table of peers is newer than ours


@dataclass(slots=True, kw_only=True, eq=False)
class DecodeStay(Stay):
    """``prefill``: who has been told of the lease and has not yet said that the pages are full."""

    room: Room
    sampling: Sampling
    prefill_at: RankRef
    tokens: Sequence[int]  # the prompt, or empty
    prefill: Peer | None = None


def find_prefill(table: PeerTable, named: RankRef) -> Peer | None:
    """Which prefill rank has the room: the one that the request names, in that incarnation."""
    return table.find(named.rank, named.incarnation)


class DecodeService(LanguageRank[DecodeStay, ToDecode]):
    """Decode → KvLease → KvReady → Token…, Finished."""

    kind = Kind.DECODE
    _kv: Pool

    def __init__(self, spec: RankSpec, parts: Parts = NATIVE) -> None:
        super().__init__(spec, TO_DECODE, parts)
        self._rooms: dict[tuple[Room, int], DecodeStay] = {}
        self._links: Links[PrefillToDecode, ToPrefill] = Links(
            PREFILL_TO_DECODE, TO_PREFILL, self._answered, stages=frozenset({Stage.PREFILL}), lost=self._lost
        )

    def _pools(self) -> Sequence[Pool]:
        kv = self.machine.loaded.kv
        self._extents = PageExtents(self.machine.pages, kv.layout.page_bytes)
        self._kv = Pool("kv", kv.memory, self._extents)
        return [self._kv]

    @property
    def _quarantined_pages(self) -> int:
        return sum(self._extents.held(lease.extents) for lease in self._kv.leases.live(SlotState.QUARANTINED))

    def _received(self, sender: Sender, message: ToDecode, _: list[memoryview]) -> None:
        match message:
            case Decode():
                self._decode(sender, message)
            case Abort():
                self._abort(message)
            case _:
                assert_never(message)

    def _decode(self, sender: Sender, message: Decode) -> None:
        tokens = message.prompt_tokens + message.sampling.max_tokens
        stay = DecodeStay(
            request=message.request,
            attempt=message.attempt,
            epoch=message.epoch,
            sender=sender,
            need=Need(pages_for(tokens, self.machine.page_size)),
            prompt_tokens=message.prompt_tokens,
            ends_at=self._loop.time() + message.budget_s,
            room=message.room,
            sampling=message.sampling,
            prefill_at=message.prefill_at,
            tokens=message.tokens,
        )
        if not self._enter(stay):
            return
        self._rooms[stay.room, stay.attempt] = stay
        if message.sampling.looks_back and len(message.tokens) != message.prompt_tokens:
            text = f"a prompt of {message.prompt_tokens} tokens whose penalties know {len(message.tokens)} of them"
            self._end(stay, Refusal(FailureKind.INTERNAL, text))
        else:
            self._queue(stay)

    # -- memory --

    def _take(self, stay: DecodeStay) -> Grant | None:
        if self._full(stay.need):
            return None
        try:
            lease = self._kv.lease(stay.need.pages, stay.name, seconds=self._left(stay))
        except PoolExhausted:
            return None
        return Grant(self._extents.pages_of(lease.extents), (lease,))

    def _release(self, _: DecodeStay, grant: Grant) -> None:
        """Pages that prefill may still write to are free or quarantined by the pool's rule, in one place."""
        for lease in grant.leases:
            self._kv.release(lease.id)

    # -- the handoff --

    def _granted(self, stay: DecodeStay) -> None:
        if self._introduce(stay):
            return
        present = self._links.table.find(stay.prefill_at.rank)
        if present is not None and present.incarnation > stay.prefill_at.incarnation:
            self._give_up_on_prefill(stay)  # it was there once, and will not come back
        else:
            self._loop.call_later(INTRODUCTION_SECONDS, self._give_up_on_prefill, stay)

    def _introduce(self, stay: DecodeStay) -> bool:
        """Offer the lease to the prefill rank of this room; False when that rank is not known (yet)."""
        peer = find_prefill(self._links.table, stay.prefill_at)
        if peer is None:
            return False
        (lease,) = stay.holding().leases
        offer = KvLease(
            request=stay.request,
            attempt=stay.attempt,
            room=stay.room,
            lease=lease.remote(self._addresses[self._kv.name]),
            layout=self.machine.loaded.kv.layout,
            epoch=peer.epoch,
        )
        try:
            self._links.send(peer, offer)
        except PeerGone as error:
            self._end(stay, Refusal(FailureKind.RANK_LOST, f"{peer.rank} cannot be reached: {error.message}"))
            return True
        stay.prefill = peer
        return True

    def _give_up_on_prefill(self, stay: DecodeStay) -> None:
        if stay.phase is Phase.GRANTED and stay.prefill is None:
            named = stay.prefill_at
            text = f"{named.rank} (incarnation {named.incarnation}) is not among the routable ranks"
            self._end(stay, Refusal(FailureKind.RANK_LOST, text))

    def _peers(self, peers: Sequence[Peer], changes: Changes) -> None:
        self._links.peers_changed(peers)
        for stay in list(self._stays.values()):
            if stay.phase is Phase.GRANTED and stay.prefill is None:
                self._introduce(stay)

    def _lost(self, peer: Peer) -> None:
        """Its rooms end here; those whose pages are full do not need it any more."""
        for stay in list(self._stays.values()):
            if stay.prefill == peer:
                self._end(stay, Refusal(FailureKind.RANK_LOST, f"{peer.rank} went away before the prompt was computed"))

    def _leaving(self, stay: DecodeStay, _: Refusal | None) -> None:
        self._rooms.pop((stay.room, stay.attempt), None)
        if stay.prefill is not None:
            with contextlib.suppress(PeerGone):  # then it counts on nothing either
                self._links.send(stay.prefill, KvWithdrawn(room=stay.room, attempt=stay.attempt))
            stay.prefill = None

    def _answered(self, peer: Peer, message: PrefillToDecode, _: list[memoryview]) -> None:
        stay = self._rooms.get((message.room, message.attempt))
        if stay is None or stay.prefill != peer or stay.phase is not Phase.GRANTED:
            return  # given up meanwhile
        stay.prefill = None
        match message:
            case KvReady():
                self._begin(stay, message)
            case KvFailed():
                self._end(stay, Refusal(message.kind, message.text))
            case _:
                assert_never(message)

    def _doing(self, stay: DecodeStay) -> str:
        if stay.phase is Phase.GRANTED:
            return f"waiting for the prompt's KV from {stay.prefill_at.rank}"
        return super()._doing(stay)

    # -- the answer --

    def _begin(self, stay: DecodeStay, ready: KvReady) -> None:
        """The pages are full: turn late writers away, send the first token, and go on from there."""
        (lease,) = stay.holding().leases
        self._kv.filled(lease.id, lease.generation)
        self._answer(stay, ready.first_token, self._ends_with(stay.sampling, ready.first_token), ready.likelihood)
        if stay.over:
            return
        # The engine computes from the first token on; only penalties look at the prompt, else zeros hold its places.
        tokens = [*(stay.tokens or [0] * stay.prompt_tokens), ready.first_token]
        new = NewSequence(
            id=stay.name,
            tokens=tokens,
            sampling=stay.sampling,
            pages=stay.holding().pages,
            max_new_tokens=stay.sampling.max_tokens - 1,
            computed=stay.prompt_tokens,
            rope_delta=ready.rope_delta,
        )
        self._run(stay, new)

    def _ends_with(self, sampling: Sampling, first: int) -> FinishReason | None:
        if first in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if sampling.max_tokens <= 1 else None

    def _advanced(self, stay: DecodeStay, advance: Advance, made: object | None) -> None:
        if advance.token is not None:
            self._answer(stay, advance.token, advance.finished, advance.likelihood)

    async def close(self) -> None:
        self._links.close()
        await super().close()

    def check(self) -> None:
        super().check()
        self._kv.check()
        assert len(self._rooms) == sum(not stay.over for stay in self._stays.values()), "a room without a stay"
