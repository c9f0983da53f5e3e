"""Which encoder rank works on which item. Pure: events and the time go in, actions come out.

A rank works on at most ``cap`` items; what waits is bounded. An item whose rank dies goes to a rank it has not been on:
by name, so that a picture that kills encoders cannot kill one of them twice. A picture that came before goes where its
embedding may still be, unless that rank has much more to do than another.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from epdctl.encoder.items import (
    Action,
    Cancel,
    Ended,
    Item,
    ItemEvent,
    ItemKey,
    ItemState,
    RankKey,
    Send,
)
from epdctl.encoder.ranks import FULL_SECONDS, Outlook, Ranks
from epdctl.ids import RequestId
from epdctl.wire.encode import FailureKind

__all__ = ["Dispatcher", "Ended", "RankKey"]


def _draw() -> int:
    return secrets.randbits(63)


class Dispatcher:
    """Every item that has not ended, and every rank that may take one. ``now`` is on the clock of the deadlines.

    ``wait``: seconds an item waits while no rank that it may go to is there. ``remember``: of how many pictures it is
    known which rank had them last; 0 where ranks keep nothing.
    """

    def __init__(
        self,
        *,
        cap: int,
        queue: int,
        wait: float = math.inf,
        remember: int = 0,
        draw: Callable[[], int] = _draw,
    ) -> None:
        self.queue = queue
        self.wait = wait
        self.late = 0  # replies to dispatches that are over
        self._draw = draw
        self._items: dict[ItemKey, Item] = {}
        self._waiting: deque[Item] = deque()
        self._dispatched: dict[int, Item] = {}
        self._ranks = Ranks(cap, remember)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def ranks(self) -> list[RankKey]:
        """Those that may take items, in the order of their names."""
        return sorted(self._ranks)

    @property
    def open_ranks(self) -> list[RankKey]:
        """Those that items may go to, now or once they have room."""
        return self._ranks.open

    def pending(self, rank: RankKey) -> int:
        return self._ranks.pending(rank)

    def next_deadline(self) -> float | None:
        """When ``tick`` has something to do at the earliest."""
        times = [item.deadline for item in self._items.values()]
        times += [item.alone_since + self.wait for item in self._waiting if item.alone_since is not None]
        if self._waiting and (ask := self._ranks.next_ask) is not None:
            times.append(ask)
        return min(times, default=None)

    # -- what clients and the table say --

    def submit(self, key: ItemKey, deadline: float, now: float, content: str = "") -> list[Action]:
        """A new item; it may end at once, FULL or NO_RANK. The same key again while it lives is the same item: nothing
        to do."""
        if key in self._items:
            return []
        item = self._items[key] = Item(key, deadline, content)
        self._waiting.append(item)
        actions = self._pump(now)
        if item.state is ItemState.QUEUED:
            actions += self._review([item], now)
        if item.state is ItemState.QUEUED and len(self._waiting) > self.queue:
            actions += self._fail(item, FailureKind.FULL, f"{self.queue} pictures are waiting already")
        return actions

    def cancel(self, client: bytes, request: RequestId, attempt: int, now: float) -> list[Action]:
        """Every item of the attempt. Unknown ones are fine."""
        wanted = (client, request, attempt)
        actions: list[Action] = []
        for item in [item for item in self._items.values() if item.key[:3] == wanted]:
            actions += self._withdraw(item)
            self._end(item, ItemEvent.CANCEL)
            actions.append(Ended(item.key, item.state))
        return actions + self._pump(now)

    def changed(
        self,
        joined: Sequence[RankKey],
        left: Sequence[RankKey],
        now: float,
        resting: Iterable[RankKey] = (),
        outlook: Outlook | None = None,
    ) -> list[Action]:
        """The table is another one. Items of ranks that left wait at the front of the queue, or fail RANK_LOST where
        every rank that is there or coming has had them. Ranks that are ``resting`` keep theirs. A rank in ``joined``
        and ``left`` had been given up and is there again.
        """
        self._lose(left)
        self._ranks.leave(left)
        self._ranks.join(joined)
        self._ranks.rest(resting)
        self._ranks.outlook = outlook
        return self._settle(now)

    def cut(self, rank: RankKey, now: float) -> list[Action]:
        """The connection to ``rank`` broke: what was said on it may be lost, both ways. Its items go to others, and it
        gets none until ``mended``; it may well be alive, so they are called off.
        """
        cancels: list[Action] = [Cancel(rank, number) for number, item in self._dispatched.items() if item.at == rank]
        self._lose([rank])
        self._ranks.cut(rank)
        return [*cancels, *self._settle(now)]

    def mended(self, rank: RankKey, now: float) -> list[Action]:
        self._ranks.mend(rank)
        return self._settle(now)

    def abandon(self, text: str) -> list[Action]:
        """Everything that waits or is dispatched ends: nobody waits for it any more."""
        actions: list[Action] = []
        for item in [item for item in self._items.values() if item.state is not ItemState.ENCODED]:
            actions += self._fail(item, FailureKind.RANK_LOST, text)
        return actions

    # -- what ranks say --

    def refused(self, dispatch: int, by: RankKey, now: float) -> list[Action]:
        """The rank is being stopped: it takes neither this item nor another."""
        return self._not_taken(dispatch, by, now, lambda: self._ranks.close(by))

    def full(self, dispatch: int, by: RankKey, now: float) -> list[Action]:
        """The rank has less room than was thought here."""
        return self._not_taken(dispatch, by, now, lambda: self._ranks.fill(by, now + FULL_SECONDS))

    def _not_taken(self, dispatch: int, by: RankKey, now: float, note: Callable[[], None]) -> list[Action]:
        """The item has not been on that rank, and goes on to whoever takes it, ahead of the others."""
        item = self._reply(dispatch, by)
        if item is None:
            return []
        self._requeue(item)
        self._waiting.appendleft(item)
        note()
        return self._settle(now)

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
        end = Ended(item.key, item.state, by=by, kind=why[0], text=why[1], lost=tuple(item.lost))
        return [end, *self._pump(now)]

    # -- what time says --

    def tick(self, now: float) -> list[Action]:
        """End what is out of time, or has waited long enough for somebody to wait for."""
        actions: list[Action] = []
        open_items = [item for item in self._items.values() if item.state is not ItemState.ENCODED]
        for item in [item for item in open_items if item.deadline <= now]:
            actions += self._fail(item, *self._lateness(item))
        for item in [item for item in self._waiting if item.alone_since is not None]:
            if item.alone_since is not None and item.alone_since + self.wait <= now:
                actions += self._fail(item, *_alone(item, f"it waited {self.wait:g} s (limits.wait_seconds)"))
        return actions + self._pump(now)

    def _lateness(self, item: Item) -> tuple[FailureKind, str]:
        if item.state is ItemState.QUEUED and not self._ranks.open:
            return FailureKind.NO_RANK, "no encoder was ready within the deadline"
        where = f"on {item.at.rank}" if item.at else "waiting for an encoder"
        return FailureKind.DEADLINE, f"out of time {where}"

    # -- the queue --

    def _settle(self, now: float) -> list[Action]:
        """The ranks are others, or fewer: see who waits in vain, and give what can be given."""
        return [*self._review(list(self._waiting), now), *self._pump(now)]

    def _review(self, waiting: Collection[Item], now: float) -> list[Action]:
        actions: list[Action] = []
        for item in waiting:
            if not self._ranks.hope(item):
                actions += self._fail(item, *_alone(item, self._ranks.why_not))
            elif self._ranks.takes(item):
                item.alone_since = None
            elif item.alone_since is None:
                item.alone_since = now
        return actions

    def _pump(self, now: float) -> list[Action]:
        """Give waiting items, oldest first, to ranks with room."""
        self._ranks.empty(now)
        sent: list[Action] = []
        for item in list(self._waiting):
            if not any(map(self._ranks.has_room, self._ranks.open)):
                break
            if (rank := self._ranks.choose(item)) is not None:
                self._waiting.remove(item)
                sent.append(self._send(item, rank, now))
        return sent

    def _send(self, item: Item, rank: RankKey, now: float) -> Send:
        item.move(ItemEvent.SEND)
        item.at, item.dispatch, item.alone_since = rank, self._draw(), None
        self._ranks.give(rank, item.dispatch, item.content)
        self._dispatched[item.dispatch] = item
        return Send(item.key, rank, item.dispatch, max(0.0, item.deadline - now))

    def _lose(self, ranks: Collection[RankKey]) -> None:
        """What these ranks have goes to the front of the queue, the most urgent first."""
        lost = [item for item in self._dispatched.values() if item.at in ranks]
        for item in lost:
            if item.at is not None:
                item.lost.append(item.at)
            self._requeue(item)
        self._waiting.extendleft(sorted(lost, key=lambda item: item.deadline)[::-1])

    def _requeue(self, item: Item) -> None:
        """It has to stand in the queue again: where, the caller knows."""
        self._leave_rank(item)
        item.move(ItemEvent.RANK_LEFT)

    def _reply(self, dispatch: int, by: RankKey) -> Item | None:
        item = self._dispatched.get(dispatch)
        if item is None or item.at != by:
            self.late += 1
            return None
        return item

    def _leave_rank(self, item: Item) -> None:
        if item.at is not None:
            self._ranks.take(item.at, item.dispatch)
            del self._dispatched[item.dispatch]
            item.at = None

    def _withdraw(self, item: Item) -> list[Action]:
        """Take the item from where it is."""
        if item.state is ItemState.QUEUED:
            self._waiting.remove(item)
        if item.at is None:
            return []
        cancel = Cancel(item.at, item.dispatch)
        self._leave_rank(item)
        return [cancel]

    def _fail(self, item: Item, kind: FailureKind, text: str) -> list[Action]:
        at = item.at
        actions = self._withdraw(item)
        self._end(item, ItemEvent.FAIL)
        return [*actions, Ended(item.key, item.state, by=at, kind=kind, text=text, lost=tuple(item.lost))]

    def _end(self, item: Item, event: ItemEvent) -> None:
        item.move(event)
        del self._items[item.key]

    def check(self) -> None:
        """Raises AssertionError when an item is nowhere, twice somewhere, or the ranks' books are off."""
        waiting = [item.key for item in self._waiting]
        dispatched = [item.key for item in self._dispatched.values()]
        told = [item.key for item in self._items.values() if item.state is ItemState.ENCODED]
        assert sorted([*waiting, *dispatched, *told]) == sorted(self._items), "an item is lost or in two places"
        assert all(item.state is ItemState.QUEUED for item in self._waiting), "a waiting item is not queued"
        assert all(item.state is ItemState.DISPATCHED for item in self._dispatched.values()), "not dispatched"
        self._ranks.check(len(self._dispatched))


def _alone(item: Item, why: str) -> tuple[FailureKind, str]:
    """The end of an item that no rank was there for."""
    if not item.lost:
        return FailureKind.NO_RANK, f"no encoder is ready; {why}"
    return FailureKind.RANK_LOST, f"lost with {', '.join(sorted(item.tried))}; no other encoder is ready; {why}"
