"""The life of an item in the router: its states, whose it is, and what is to be done about it. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from epdctl.errors import EpdError
from epdctl.ids import Incarnation, RankName, RequestId
from epdctl.wire.encode import FailureKind

__all__ = [
    "ENDED",
    "TRANSITIONS",
    "Action",
    "Cancel",
    "Ended",
    "Item",
    "ItemEvent",
    "ItemKey",
    "ItemState",
    "RankKey",
    "Send",
]


class ItemState(enum.StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    ENCODED = "encoded"  # the bytes are in the slot, the client is being told
    DELIVERED = "delivered"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ItemEvent(enum.StrEnum):
    SEND = "send"
    RANK_LEFT = "rank-left"
    ENCODE = "encode"
    DELIVER = "deliver"
    FAIL = "fail"
    CANCEL = "cancel"


ENDED = frozenset({ItemState.DELIVERED, ItemState.FAILED, ItemState.CANCELLED})

TRANSITIONS: Mapping[tuple[ItemState, ItemEvent], ItemState] = {
    (ItemState.QUEUED, ItemEvent.SEND): ItemState.DISPATCHED,
    (ItemState.QUEUED, ItemEvent.FAIL): ItemState.FAILED,
    (ItemState.QUEUED, ItemEvent.CANCEL): ItemState.CANCELLED,
    (ItemState.DISPATCHED, ItemEvent.RANK_LEFT): ItemState.QUEUED,
    (ItemState.DISPATCHED, ItemEvent.ENCODE): ItemState.ENCODED,
    (ItemState.DISPATCHED, ItemEvent.FAIL): ItemState.FAILED,
    (ItemState.DISPATCHED, ItemEvent.CANCEL): ItemState.CANCELLED,
    (ItemState.ENCODED, ItemEvent.DELIVER): ItemState.DELIVERED,
    (ItemState.ENCODED, ItemEvent.CANCEL): ItemState.CANCELLED,
}


class ItemKey(NamedTuple):
    """One item of one attempt of one client."""

    client: bytes
    request: RequestId
    attempt: int
    item: int  # MediaItem.index


class RankKey(NamedTuple):
    rank: RankName
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class Send:
    """Give ``item`` to ``to`` under this number; ``seconds`` are left of its deadline."""

    item: ItemKey
    to: RankKey
    dispatch: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Cancel:
    to: RankKey
    dispatch: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The last word on ``item``: ENCODED (tell the client, then say delivered), FAILED with why, or CANCELLED."""

    item: ItemKey
    state: ItemState
    by: RankKey | None = None
    kind: FailureKind | None = None
    text: str = ""
    lost: tuple[RankKey, ...] = ()


Action = Send | Cancel | Ended


@dataclass(slots=True)
class Item:
    """The dispatcher's own."""

    key: ItemKey
    deadline: float
    content: str  # the hash of its picture; "" when it is like no other
    state: ItemState = ItemState.QUEUED
    at: RankKey | None = None
    dispatch: int = 0
    lost: list[RankKey] = field(default_factory=list)  # the ranks that left while they had it
    alone_since: float | None = None  # it waits, and there is no rank that it may go to

    @property
    def tried(self) -> set[RankName]:
        """It goes to none of these again."""
        return {rank for rank, _ in self.lost}

    def move(self, event: ItemEvent) -> None:
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise EpdError(f"item {self.key.item} of {self.key.request} is {self.state}: {event} is not possible")
        self.state = after
