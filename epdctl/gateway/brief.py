"""What each rank of one attempt is told. Pure: from an order, and what is known of its answer, to messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from epdctl.gateway.intake import Order
from epdctl.gateway.ranks import Route
from epdctl.ids import RequestId, Room
from epdctl.wire.encode import Encode
from epdctl.wire.lifecycle import Peer
from epdctl.wire.serve import Decode, Generate, Prefill, RankRef, Sampling
from epdctl.wire.transfer import RemoteLease

__all__ = ["Brief"]


@dataclass(frozen=True, slots=True)
class Brief:
    """One attempt. ``known``: tokens of the answer that earlier attempts received; they become part of the prompt."""

    request: RequestId
    attempt: int
    room: Room
    route: Route
    order: Order
    known: Sequence[int]

    @property
    def tokens(self) -> list[int]:
        return [*self.order.prompt.tokens, *self.known]

    @property
    def sampling(self) -> Sampling:
        whole = self.order.sampling
        return msgspec.structs.replace(whole, max_tokens=whole.max_tokens - len(self.known))

    def decode(self, budget_s: float) -> Decode:
        return Decode(
            request=self.request,
            attempt=self.attempt,
            room=self.room,
            prompt_tokens=len(self.order.prompt.tokens) + len(self.known),
            sampling=self.sampling,
            prefill_at=_ref(self.route.entry),
            budget_s=budget_s,
            epoch=self.route.exit.epoch,
            tokens=self.tokens if self.order.sampling.looks_back else [],
        )

    def prefill(self, budget_s: float) -> Prefill:
        return Prefill(
            request=self.request,
            attempt=self.attempt,
            room=self.room,
            tokens=self.tokens,
            items=self.order.prompt.items,
            sampling=self.sampling,
            decode_at=_ref(self.route.exit),
            budget_s=budget_s,
            epoch=self.route.entry.epoch,
        )

    def generate(self, budget_s: float) -> Generate:
        return Generate(
            request=self.request,
            attempt=self.attempt,
            tokens=self.tokens,
            items=self.order.prompt.items,
            sampling=self.sampling,
            budget_s=budget_s,
            epoch=self.route.entry.epoch,
        )

    def encode(self, index: int, slot: RemoteLease, notify: str, budget_s: float) -> Encode:
        """Goes with the medium's bytes behind it."""
        return Encode(
            request=self.request,
            attempt=self.attempt,
            item=self.order.media_item(index),
            slot=slot,
            notify=notify,
            budget_s=budget_s,
        )


def _ref(peer: Peer) -> RankRef:
    return RankRef(rank=peer.rank, incarnation=peer.incarnation)
