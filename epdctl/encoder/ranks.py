"""The encoder ranks as the router sees them: what each works on, who takes more, who is going to be there. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from epdctl.encoder.items import Item, RankKey
from epdctl.ids import RankName

__all__ = ["FULL_SECONDS", "Outlook", "Ranks"]

DETOUR = 4  # items: how much more a rank may have to do than the least busy one and still be preferred for its memory
FULL_SECONDS = 0.05  # a rank that said FULL is asked again after this, or when it has ended something


class Outlook(NamedTuple):
    """What is known of the planned ranks that are not there."""

    coming: frozenset[RankName]
    gone: str = ""  # why the others are not going to be there


class Ranks:
    """``cap``: items a rank works on at most. ``remember``: of how many pictures it is known who had them last."""

    def __init__(self, cap: int, remember: int) -> None:
        self.cap = cap
        self.remember = remember
        self.outlook: Outlook | None = None  # nobody has told
        self._work: dict[RankKey, set[int]] = {}  # dispatches; the first rank is the next among equals
        self._resting: frozenset[RankKey] = frozenset()  # these finish what they have, and are given nothing new
        self._leaving: set[RankKey] = set()  # they have said so themselves, before the table did
        self._cut: set[RankKey] = set()  # the connection to them is down
        self._full: dict[RankKey, float] = {}  # until then they are not asked again
        self._holders: OrderedDict[str, RankKey] = OrderedDict()  # content → who had it last; the oldest news first

    def __iter__(self) -> Iterator[RankKey]:
        return iter(self._work)

    # -- who is there --

    def join(self, ranks: Iterable[RankKey]) -> None:
        for rank in ranks:
            self._work.setdefault(rank, set())

    def leave(self, ranks: Collection[RankKey]) -> None:
        """Their work has been taken from them."""
        for rank in ranks:
            self._work.pop(rank, None)
            self._full.pop(rank, None)
        self._leaving.difference_update(ranks)
        self._cut.difference_update(ranks)
        self._forget(ranks)

    def rest(self, ranks: Iterable[RankKey]) -> None:
        self._resting = frozenset(ranks)

    def close(self, rank: RankKey) -> None:
        """It is being stopped, and never takes anything again."""
        self._leaving.add(rank)

    def cut(self, rank: RankKey) -> None:
        if rank in self._work:
            self._cut.add(rank)

    def mend(self, rank: RankKey) -> None:
        self._cut.discard(rank)

    def fill(self, rank: RankKey, until: float) -> None:
        """It has no room, whatever was thought here."""
        self._full[rank] = until

    def empty(self, now: float) -> None:
        """Whoever said FULL long enough ago may be asked again."""
        self._full = {rank: until for rank, until in self._full.items() if until > now}

    @property
    def next_ask(self) -> float | None:
        return min(self._full.values(), default=None)

    # -- who takes what --

    @property
    def open(self) -> list[RankKey]:
        """Ranks that take new items, now or once they have room."""
        closed = self._resting.union(self._leaving, self._cut)
        return [rank for rank in self._work if rank not in closed]

    def pending(self, rank: RankKey) -> int:
        return len(self._work.get(rank, ()))

    def has_room(self, rank: RankKey) -> bool:
        return len(self._work[rank]) < self.cap and rank not in self._full

    def takes(self, item: Item) -> bool:
        """Some rank that it may go to is there."""
        tried = item.tried
        return any(rank.rank not in tried for rank in self.open)

    def hope(self, item: Item) -> bool:
        """Some rank that it may go to is there, or is going to be."""
        tried = item.tried
        if self.outlook is None and not tried:
            return True
        coming = frozenset() if self.outlook is None else self.outlook.coming
        return not tried.issuperset({rank.rank for rank in self._work} | coming)

    @property
    def why_not(self) -> str:
        """Why there is no hope."""
        return "none is coming" if self.outlook is None or not self.outlook.gone else self.outlook.gone

    def choose(self, item: Item) -> RankKey | None:
        """Least pending, among equals the one that was sent to longest ago; or who has had this picture before."""
        tried = item.tried
        ranks = [rank for rank in self.open if rank.rank not in tried and self.has_room(rank)]
        least = min(ranks, key=self.pending, default=None)
        holder = self._holders.get(item.content)
        if holder is None or least is None or holder not in ranks:
            return least
        return holder if self.pending(holder) - self.pending(least) < DETOUR else least

    def give(self, rank: RankKey, dispatch: int, content: str) -> None:
        work = self._work.pop(rank)
        work.add(dispatch)
        self._work[rank] = work  # to the end: round robin
        self._note_holder(content, rank)

    def take(self, rank: RankKey, dispatch: int) -> None:
        self._work[rank].discard(dispatch)
        self._full.pop(rank, None)

    # -- who remembers what --

    def _note_holder(self, content: str, rank: RankKey) -> None:
        if not content or not self.remember:
            return
        self._holders[content] = rank
        self._holders.move_to_end(content)
        if len(self._holders) > self.remember:
            self._holders.popitem(last=False)

    def _forget(self, ranks: Collection[RankKey]) -> None:
        for content in [content for content, rank in self._holders.items() if rank in ranks]:
            del self._holders[content]

    def check(self, dispatched: int) -> None:
        """Raises AssertionError when a rank has more than its cap, or one that is gone is still known."""
        known = set(self._work)
        assert sum(map(len, self._work.values())) == dispatched, "a dispatch without a rank"
        assert all(len(work) <= self.cap for work in self._work.values()), "a rank is over its cap"
        assert len(self._holders) <= self.remember, "more is remembered than allowed"
        assert known.issuperset(self._holders.values()), "a rank that is gone is remembered"
        assert known.issuperset({*self._leaving, *self._cut, *self._full}), "a rank that is gone is kept book of"
