"""Which encoder rank works on which item. Pure: events and the time go in, actions come out.

A rank works on at most ``cap`` items; what waits is bounded. An item whose rank dies goes to a rank it has not been on:
by name, so that a picture that kills encoders cannot kill one of them twice. A picture that came before goes where its
embedding may still be, unless that rank has much more to do than another.
"""

from __future__ import annotations

import enum
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    "Dispatcher",
    "Ended",
    "ItemEvent",
    "ItemKey",
    "ItemState",
    "RankKey",
    "Send",
]


DETOUR = 4  # items: how much more a rank may have to do than the least busy one and still be preferred for its memory


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
class _Item:
    key: ItemKey
    deadline: float
    content: str  # the hash of its picture; "" when it is like no other
    state: ItemState = ItemState.QUEUED
    at: RankKey | None = None
    dispatch: int = 0
    tried: set[RankName] = field(default_factory=set)
    lost: list[RankKey] = field(default_factory=list)  # the ranks that left while they had it

    def move(self, event: ItemEvent) -> None:
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise EpdError(f"item {self.key.item} of {self.key.request} is {self.state}: {event} is not possible")
        self.state = after


def _draw() -> int:
    return secrets.randbits(63)


class Dispatcher:
    """Every item that has not ended, and every rank that may take one. ``now`` is on the clock of the deadlines.

    ``remember``: of how many pictures it is known which rank had them last; 0 where ranks keep nothing.
    """

    def __init__(self, *, cap: int, queue: int, remember: int = 0, draw: Callable[[], int] = _draw) -> None:
        self.cap = cap
        self.queue = queue
        self.remember = remember
        self.late = 0  # replies to dispatches that are over
        self._draw = draw
        self._items: dict[ItemKey, _Item] = {}
        self._waiting: deque[_Item] = deque()
        self._dispatched: dict[int, _Item] = {}
        self._holders: OrderedDict[str, RankKey] = OrderedDict()  # content → who had it last; the oldest news first
        self._resting: frozenset[RankKey] = frozenset()  # these finish what they have, and are given nothing new
        self._ranks: dict[RankKey, set[int]] = {}  # the dispatches each works on; the first is the next among equals

    def __len__(self) -> int:
        return len(self._items)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def ranks(self) -> list[RankKey]:
        """Those that may take items, in the order of their names."""
        return sorted(self._ranks)

    def pending(self, rank: RankKey) -> int:
        return len(self._ranks.get(rank, ()))

    def next_deadline(self) -> float | None:
        return min((item.deadline for item in self._items.values()), default=None)

    def holder(self, content: str) -> RankKey | None:
        """The rank that may remember this picture."""
        return self._holders.get(content)

    def submit(self, key: ItemKey, deadline: float, now: float, content: str = "") -> list[Action]:
        """A new item; it may end at once, FULL. The same key again while it lives is the same item: nothing to do."""
        if key in self._items:
            return []
        item = self._items[key] = _Item(key, deadline, content)
        self._waiting.append(item)
        actions = self._pump(now)
        if item.state is ItemState.QUEUED and len(self._waiting) > self.queue:
            actions += self._fail(item, FailureKind.FULL, f"{self.queue} pictures are waiting already")
        return actions

    def changed(
        self, joined: Sequence[RankKey], left: Sequence[RankKey], now: float, resting: Iterable[RankKey] = ()
    ) -> list[Action]:
        """Items of ranks that left go to the front of the queue, the most urgent first, or fail RANK_LOST where no
        rank that they have not been on is there. Ranks that are ``resting`` keep theirs. A rank in ``joined`` and
        ``left`` had been given up and is there again.
        """
        lost = [item for item in self._dispatched.values() if item.at in left]  # in the order sent
        for item in lost:
            if item.at is not None:
                item.lost.append(item.at)
            self._requeue(item)
        for rank in left:
            self._ranks.pop(rank, None)
        for content in [content for content, rank in self._holders.items() if rank in left]:
            del self._holders[content]
        for rank in joined:
            self._ranks.setdefault(rank, set())
        self._resting = frozenset(resting)
        self._waiting.extendleft(sorted(lost, key=lambda item: item.deadline)[::-1])
        return [*self._fail_stranded(), *self._pump(now)]

    def _requeue(self, item: _Item) -> None:
        """It has to stand in the queue again: where, the caller knows."""
        self._leave_rank(item)
        item.move(ItemEvent.RANK_LEFT)

    def _fail_stranded(self) -> list[Action]:
        actions: list[Action] = []
        for item in [item for item in self._waiting if item.tried and not self._untried(item)]:
            tried = ", ".join(sorted(item.tried))
            how = "lost with" if item.lost else "refused by"
            actions += self._fail(item, FailureKind.RANK_LOST, f"{how} {tried}; no other encoder is ready")
        return actions

    def abandon(self, text: str) -> list[Action]:
        """Everything that waits or is dispatched ends: nobody waits for it any more."""
        actions: list[Action] = []
        for item in [item for item in self._items.values() if item.state is not ItemState.ENCODED]:
            actions += self._fail(item, FailureKind.RANK_LOST, text)
        return actions

    def refused(self, dispatch: int, by: RankKey, now: float) -> list[Action]:
        """The rank takes nothing new: the item goes on to another."""
        item = self._reply(dispatch, by)
        if item is None:
            return []
        self._requeue(item)
        self._waiting.appendleft(item)
        return [*self._fail_stranded(), *self._pump(now)]

    def item_of(self, dispatch: int, by: RankKey) -> ItemKey | None:
        """Which item ``by`` is speaking of; None when that is over."""
        item = self._dispatched.get(dispatch)
        return None if item is None or item.at != by else item.key

    def encoded(self, dispatch: int, by: RankKey, now: float) -> list[Action]:
        item = self._reply(dispatch, by)
        if item is None:
            return []
        self._leave_rank(item)
        item.move(ItemEvent.ENCODE)
        return [Ended(item.key, item.state, by=by), *self._pump(now)]

    def delivered(self, key: ItemKey) -> None:
        """The client was told that ``key`` is encoded."""
        self._end(self._items[key], ItemEvent.DELIVER)

    def undeliverable(self, key: ItemKey) -> None:
        """``key`` is encoded, and its client is gone."""
        self._end(self._items[key], ItemEvent.CANCEL)

    def failed(self, dispatch: int, by: RankKey, why: tuple[FailureKind, str], now: float) -> list[Action]:
        """The rank gave the item up; another would fare no better."""
        item = self._reply(dispatch, by)
        if item is None:
            return []
        self._leave_rank(item)
        self._end(item, ItemEvent.FAIL)
        return [Ended(item.key, item.state, by=by, kind=why[0], text=why[1]), *self._pump(now)]

    def cancel(self, client: bytes, request: RequestId, attempt: int, now: float) -> list[Action]:
        """Every item of the attempt. Unknown ones are fine."""
        wanted = (client, request, attempt)
        actions: list[Action] = []
        for item in [item for item in self._items.values() if item.key[:3] == wanted]:
            actions += self._withdraw(item)
            self._end(item, ItemEvent.CANCEL)
            actions.append(Ended(item.key, item.state))
        return actions + self._pump(now)

    def tick(self, now: float) -> list[Action]:
        """End what is out of time."""
        actions: list[Action] = []
        open_items = [item for item in self._items.values() if item.state is not ItemState.ENCODED]
        for item in [item for item in open_items if item.deadline <= now]:
            actions += self._fail(item, *self._lateness(item))
        return actions + self._pump(now)

    def _lateness(self, item: _Item) -> tuple[FailureKind, str]:
        if item.state is ItemState.QUEUED and not self._open:
            return FailureKind.NO_RANK, "no encoder was ready within the deadline"
        where = f"on {item.at.rank}" if item.at else "waiting for an encoder"
        return FailureKind.DEADLINE, f"out of time {where}"

    def _pump(self, now: float) -> list[Action]:
        """Give waiting items, oldest first, to ranks with room."""
        sent: list[Action] = []
        for item in list(self._waiting):
            if not any(len(self._ranks[rank]) < self.cap for rank in self._open):
                break
            if (rank := self._choose(item)) is not None:
                self._waiting.remove(item)
                sent.append(self._send(item, rank, now))
        return sent

    @property
    def _open(self) -> list[RankKey]:
        """Ranks that take new items."""
        return [rank for rank in self._ranks if rank not in self._resting]

    def _untried(self, item: _Item) -> list[RankKey]:
        return [rank for rank in self._open if rank.rank not in item.tried]

    def _choose(self, item: _Item) -> RankKey | None:
        """Least pending, among equals the one that was sent to longest ago; or who has had this picture before."""
        ranks = [rank for rank in self._untried(item) if len(self._ranks[rank]) < self.cap]
        least = min(ranks, key=self.pending, default=None)
        holder = self._holders.get(item.content)
        if holder is None or least is None or holder not in ranks:
            return least
        return holder if self.pending(holder) - self.pending(least) < DETOUR else least

    def _send(self, item: _Item, rank: RankKey, now: float) -> Send:
        item.move(ItemEvent.SEND)
        item.at, item.dispatch = rank, self._draw()
        item.tried.add(rank.rank)
        work = self._ranks.pop(rank)
        work.add(item.dispatch)
        self._ranks[rank] = work  # to the end: round robin
        self._note_holder(item.content, rank)
        self._dispatched[item.dispatch] = item
        return Send(item.key, rank, item.dispatch, max(0.0, item.deadline - now))

    def _note_holder(self, content: str, rank: RankKey) -> None:
        if not content or not self.remember:
            return
        self._holders[content] = rank
        self._holders.move_to_end(content)
        if len(self._holders) > self.remember:
            self._holders.popitem(last=False)

    def _reply(self, dispatch: int, by: RankKey) -> _Item | None:
        item = self._dispatched.get(dispatch)
        if item is None or item.at != by:
            self.late += 1
            return None
        return item

    def _leave_rank(self, item: _Item) -> None:
        if item.at is not None:
            self._ranks[item.at].discard(item.dispatch)
            del self._dispatched[item.dispatch]
            item.at = None

    def _withdraw(self, item: _Item) -> list[Action]:
        """Take the item from where it is."""
        if item.state is ItemState.QUEUED:
            self._waiting.remove(item)
        if item.at is None:
            return []
        cancel = Cancel(item.at, item.dispatch)
        self._leave_rank(item)
        return [cancel]

    def _fail(self, item: _Item, kind: FailureKind, text: str) -> list[Action]:
        at = item.at
        actions = self._withdraw(item)
        self._end(item, ItemEvent.FAIL)
        return [*actions, Ended(item.key, item.state, by=at, kind=kind, text=text, lost=tuple(item.lost))]

    def _end(self, item: _Item, event: ItemEvent) -> None:
        item.move(event)
        del self._items[item.key]

    def check(self) -> None:
        """Raises AssertionError when an item is nowhere, twice somewhere, or a rank has more than its cap."""
        waiting = [item.key for item in self._waiting]
        dispatched = [item.key for item in self._dispatched.values()]
        told = [item.key for item in self._items.values() if item.state is ItemState.ENCODED]
        assert sorted([*waiting, *dispatched, *told]) == sorted(self._items), "an item is lost or in two places"
        assert all(item.state is ItemState.QUEUED for item in self._waiting), "a waiting item is not queued"
        assert all(item.state is ItemState.DISPATCHED for item in self._dispatched.values()), "not dispatched"
        assert sum(map(len, self._ranks.values())) == len(self._dispatched), "a dispatch without a rank"
        assert all(len(work) <= self.cap for work in self._ranks.values()), "a rank is over its cap"
        assert len(self._holders) <= self.remember, "more is remembered than allowed"
        assert set(self._holders.values()) <= set(self._ranks), "a rank that is gone is remembered"
