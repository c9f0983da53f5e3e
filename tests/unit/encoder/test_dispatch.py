"""The dispatcher: who gets what, and that every item ends exactly once."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from epdctl.encoder.batching import fitting
from epdctl.encoder.dispatch import Dispatcher
from epdctl.encoder.items import (
    ENDED,
    TRANSITIONS,
    Action,
    Cancel,
    Ended,
    ItemKey,
    ItemState,
    RankKey,
    Send,
)
from epdctl.encoder.ranks import FULL_SECONDS, Outlook
from epdctl.ids import Incarnation, RankName, RequestId
from epdctl.wire.encode import FailureKind


def rank(number: int, incarnation: int = 1) -> RankKey:
    return RankKey(RankName(f"encoder/{number}"), Incarnation(incarnation))


def holder(router: Dispatcher, content: str) -> RankKey | None:
    """Who is thought to remember this picture."""
    return router._ranks._holders.get(content)


def key(number: int, request: str = "r", client: bytes = b"gateway", attempt: int = 1) -> ItemKey:
    return ItemKey(client, RequestId(request), attempt, number)


def names(*numbers: int) -> frozenset[RankName]:
    return frozenset(RankName(f"encoder/{number}") for number in numbers)


COMING = Outlook(names(0, 1))


def dispatcher(cap: int = 2, queue: int = 4, remember: int = 0, wait: float = math.inf) -> Dispatcher:
    return Dispatcher(cap=cap, queue=queue, remember=remember, wait=wait, draw=itertools.count(1).__next__)


def sends(actions: list[Action]) -> list[tuple[int, str]]:
    return [(action.item.item, str(action.to.rank)) for action in actions if isinstance(action, Send)]


def ends(actions: list[Action]) -> list[tuple[int, ItemState, FailureKind | None]]:
    return [(action.item.item, action.state, action.kind) for action in actions if isinstance(action, Ended)]


def test_a_rank_that_leaves_finishes_what_it_has_and_gets_nothing_new() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0), rank(1)], [], 0)
    assert sends(router.submit(key(0), 10, 0)) == [(0, "encoder/0")]
    assert router.changed([], [], 1, resting=[rank(0)]) == []
    assert sends(router.submit(key(1), 10, 1)) == [(1, "encoder/1")]
    assert router.submit(key(2), 10, 1) == []
    assert ends(router.encoded(1, rank(0), 2)) == [(0, ItemState.ENCODED, None)]
    assert sends(router.encoded(2, rank(1), 2)) == [(2, "encoder/1")]
    router.check()


def test_what_a_leaving_rank_refuses_goes_to_another() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0), rank(1)], [], 0)
    router.submit(key(0), 10, 0)
    assert sends(router.refused(1, rank(0), 1)) == [(0, "encoder/1")]
    assert router.refused(2, rank(1), 1) == []
    assert router.submit(key(1), 10, 1) == [], "who has said so is given nothing more"
    assert router.changed([], [rank(0), rank(1)], 2, outlook=COMING) == []
    assert sends(router.changed([rank(0, 2)], [], 3)) == [(0, "encoder/0")], "it was never on that one"
    router.check()


def test_a_rank_that_says_full_is_left_alone_for_a_moment_and_ends_nothing() -> None:
    router = dispatcher(cap=3)
    router.changed([rank(0), rank(1)], [], 0)
    for number in range(2):
        router.submit(key(number), 10, 0)
    assert sends(router.full(1, rank(0), 0)) == [(0, "encoder/1")]
    assert router.full(3, rank(1), 0) == [], "nobody else is there to ask"
    assert router.submit(key(2), 10, 0) == [], "and it stands behind the one that was there before"
    assert router.next_deadline() == FULL_SECONDS
    assert sends(router.tick(FULL_SECONDS)) == [(0, "encoder/0"), (2, "encoder/1")]
    router.check()


def test_a_rank_that_said_full_has_room_when_something_of_it_has_ended() -> None:
    router = dispatcher(cap=3)
    router.changed([rank(0)], [], 0)
    for number in range(2):
        router.submit(key(number), 10, 0)
    assert router.full(2, rank(0), 0) == []
    assert sends(router.encoded(1, rank(0), 0)) == [(1, "encoder/0")]


def test_whoever_waits_learns_which_ranks_went_away_with_the_item() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0), rank(1)], [], 0)
    router.submit(key(0), 10, 0)
    router.changed([], [rank(0)], 1)
    (end,) = router.changed([], [rank(1)], 1)
    assert isinstance(end, Ended)
    assert end.lost == (rank(0), rank(1))


def test_a_rank_that_had_been_given_up_and_is_there_again_starts_with_nothing() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0)], [], 0)
    router.submit(key(0), 10, 0)
    assert ends(router.changed([rank(0)], [rank(0)], 1)) == [(0, ItemState.FAILED, FailureKind.RANK_LOST)]
    assert sends(router.submit(key(1), 10, 1)) == [(1, "encoder/0")]
    router.check()


def test_a_router_that_had_been_given_up_ends_all_it_has() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0)], [], 0)
    router.submit(key(0), 10, 0)
    router.submit(key(1), 10, 0)
    actions = router.abandon("withdrawn")
    assert [action.dispatch for action in actions if isinstance(action, Cancel)] == [1]
    assert ends(actions) == [(number, ItemState.FAILED, FailureKind.RANK_LOST) for number in (0, 1)]
    assert len(router) == 0
    router.check()


def test_least_pending_and_round_robin_among_equals() -> None:
    router = dispatcher(cap=9)
    router.changed([rank(0), rank(1), rank(2)], [], 0)
    order = [sends(router.submit(key(number), 10, 0))[0][1] for number in range(7)]
    assert order == ["encoder/0", "encoder/1", "encoder/2"] * 2 + ["encoder/0"]
    router.encoded(2, rank(1), 0)  # now 0 has three, 2 has two, 1 has one
    assert sends(router.submit(key(7), 10, 0)) == [(7, "encoder/1")]


def test_caps_hold_and_what_waits_goes_out_in_order_as_room_appears() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0)], [], 0)
    assert sends(router.submit(key(0), 10, 0)) == [(0, "encoder/0")]
    assert router.submit(key(1), 10, 0) == router.submit(key(2), 10, 0) == []
    assert sends(router.encoded(1, rank(0), 0)) == [(1, "encoder/0")]
    assert sends(router.failed(2, rank(0), (FailureKind.BAD_MEDIA, "torn"), 0)) == [(2, "encoder/0")]
    assert sends(router.changed([rank(1)], [], 0)) == []


def test_a_full_queue_is_said_at_once() -> None:
    router = dispatcher(cap=1, queue=2)
    router.changed([rank(0)], [], 0)
    for number in range(3):
        assert ends(router.submit(key(number), 10, 0)) == []
    (end,) = router.submit(key(3), 10, 0)
    assert ends([end]) == [(3, ItemState.FAILED, FailureKind.FULL)]
    assert router.waiting == 2
    assert dispatcher(queue=0).submit(key(0), 10, 0)[0] == Ended(
        key(0), ItemState.FAILED, kind=FailureKind.FULL, text="0 pictures are waiting already"
    )


def test_a_rank_that_dies_gives_its_items_to_another_under_a_new_number_and_late_words_are_dropped() -> None:
    router = dispatcher(cap=2)
    router.changed([rank(0), rank(1)], [], 0)
    for number in range(4):
        router.submit(key(number), 10, 0)
    assert router.changed([], [rank(0)], 1) == []  # the other is at its cap: they wait, ahead of what comes later
    router.submit(key(4), 10, 1)
    (ended, sent) = router.encoded(2, rank(1), 1)
    assert ends([ended]) == [(1, ItemState.ENCODED, None)]
    assert sends([sent]) == [(0, "encoder/1")]
    assert isinstance(sent, Send)
    assert sent.dispatch > 4
    assert router.encoded(1, rank(0), 1) == []
    assert router.encoded(sent.dispatch, rank(0), 1) == []
    assert router.late == 2
    router.delivered(key(1))
    router.check()


def test_an_item_is_on_a_rank_of_one_name_once_even_after_its_restart() -> None:
    router = dispatcher()
    router.changed([rank(0)], [], 0)
    router.submit(key(0), 10, 0)
    (end,) = router.changed([rank(0, 2)], [rank(0)], 1)
    assert isinstance(end, Ended)
    text = "lost with encoder/0; no other encoder is ready; none is coming"
    assert (end.kind, end.text) == (FailureKind.RANK_LOST, text)
    assert len(router) == 0


def test_one_table_in_which_one_leaves_and_another_joins_loses_nothing() -> None:
    router = dispatcher()
    router.changed([rank(0)], [], 0)
    router.submit(key(0), 10, 0)
    assert sends(router.changed([rank(1)], [rank(0)], 1)) == [(0, "encoder/1")]


def test_a_moved_item_waits_for_a_rank_it_has_not_been_on_and_is_lost_when_there_is_none() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0), rank(1)], [], 0)
    router.submit(key(0), 10, 0)
    router.submit(key(1), 10, 0)
    assert router.changed([], [rank(0)], 1, outlook=Outlook(names(0))) == []
    both = Outlook(names(0, 1))
    assert router.changed([], [rank(1)], 1, outlook=both) == [], "0 has not been on 1, nor 1 on 0"
    assert sends(router.changed([rank(0, 2)], [], 2, outlook=Outlook(names(1)))) == [(1, "encoder/0")]
    (end,) = router.changed([], [], 3, outlook=Outlook(frozenset(), "encoder/1 is failed: no weights"))
    assert isinstance(end, Ended)
    assert (end.item.item, end.kind) == (0, FailureKind.RANK_LOST)
    assert end.text == "lost with encoder/0; no other encoder is ready; encoder/1 is failed: no weights"
    assert end.lost == (rank(0),)
    router.check()


def test_an_item_of_a_rank_that_died_waits_for_the_one_that_is_on_its_way_back() -> None:
    """It failed at once with its whole time left, while a new item of the same moment waited."""
    router = dispatcher()
    router.changed([rank(0)], [], 0, outlook=Outlook(names(1)))
    router.submit(key(0), 300, 0)
    assert router.changed([], [rank(0)], 2, outlook=COMING) == []
    assert router.submit(key(1), 300, 2) == []
    assert sends(router.changed([rank(1)], [], 5, outlook=COMING)) == [(0, "encoder/1"), (1, "encoder/1")]


def test_an_item_waits_only_so_long_for_somebody_to_wait_for() -> None:
    router = dispatcher(wait=30, cap=1)
    assert router.submit(key(0), 300, 0) == []
    assert router.next_deadline() == 30
    assert router.tick(29.9) == []
    (end,) = router.tick(30)
    text = "no encoder is ready; it waited 30 s (limits.wait_seconds)"
    assert (end.kind, end.text) == (FailureKind.NO_RANK, text)  # type: ignore[union-attr]
    router.changed([rank(0)], [], 40, outlook=COMING)
    router.submit(key(1), 300, 40)
    router.submit(key(2), 300, 40)
    assert router.tick(290) == [], "behind a busy rank it has its whole time"
    router.changed([], [rank(0)], 291, outlook=COMING)
    router.submit(key(3), 400, 291)
    assert ends(router.tick(300)) == [(number, ItemState.FAILED, FailureKind.NO_RANK) for number in (1, 2)]
    router.changed([rank(1)], [], 310, outlook=COMING)
    router.changed([], [rank(1)], 311, outlook=COMING)
    assert router.next_deadline() == 341, "what is lost waits from then on"
    (end,) = router.tick(341)
    text = "lost with encoder/1; no other encoder is ready; it waited 30 s (limits.wait_seconds)"
    assert (end.kind, end.text) == (FailureKind.RANK_LOST, text)  # type: ignore[union-attr]
    router.check()


def test_the_wait_for_somebody_begins_anew_when_nobody_is_there_again() -> None:
    router = dispatcher(wait=30, cap=1)
    for number in range(2):
        router.submit(key(number), 300, 0)
    assert sends(router.changed([rank(0)], [], 20, outlook=COMING)) == [(0, "encoder/0")]
    assert router.changed([], [], 25, [rank(0)], COMING) == []
    assert router.tick(30) == []
    assert ends(router.tick(55)) == [(1, ItemState.FAILED, FailureKind.NO_RANK)]


def test_where_every_rank_is_gone_for_good_nobody_waits() -> None:
    router = dispatcher(wait=30, cap=1)
    router.submit(key(0), 300, 0)
    gone = Outlook(frozenset(), "encoder/0 is failed: no weights")
    (end,) = router.changed([], [], 1, outlook=gone)
    text = "no encoder is ready; encoder/0 is failed: no weights"
    assert (end.kind, end.text) == (FailureKind.NO_RANK, text)  # type: ignore[union-attr]
    assert ends(router.submit(key(1), 300, 2)) == [(1, ItemState.FAILED, FailureKind.NO_RANK)]
    router.changed([rank(1)], [], 3, outlook=gone)
    assert sends(router.submit(key(2), 300, 3)) == [(2, "encoder/1")]
    assert router.submit(key(3), 300, 3) == []


def test_a_connection_that_breaks_calls_its_items_off_and_gives_them_to_others_until_it_stands_again() -> None:
    router = dispatcher()
    router.changed([rank(0), rank(1)], [], 0)
    router.submit(key(0), 10, 0)
    actions = router.cut(rank(0), 1)
    assert actions[0] == Cancel(rank(0), 1)
    assert sends(actions) == [(0, "encoder/1")]
    assert sends(router.submit(key(1), 10, 1)) == [(1, "encoder/1")], "not where nothing arrives"
    assert router.encoded(1, rank(0), 1) == []
    assert router.submit(key(2), 10, 1) == []
    assert sends(router.mended(rank(0), 2)) == [(2, "encoder/0")]
    assert router.cut(rank(7), 2) == []
    router.cut(rank(0), 3)
    router.changed([], [rank(0)], 3)
    router.check()


def test_without_a_rank_items_wait_for_one_until_their_deadline() -> None:
    router = dispatcher()
    router.submit(key(0), 10, 0)
    router.submit(key(1), 20, 0)
    assert router.next_deadline() == 10
    assert router.tick(9.99) == []
    assert ends(router.tick(10)) == [(0, ItemState.FAILED, FailureKind.NO_RANK)]
    (sent,) = router.changed([rank(0)], [], 15)
    assert isinstance(sent, Send)
    assert sent.seconds == 5
    cancel, end = router.tick(20)
    assert cancel == Cancel(rank(0), sent.dispatch)
    assert ends([end]) == [(1, ItemState.FAILED, FailureKind.DEADLINE)]
    assert router.next_deadline() is None
    assert router.pending(rank(0)) == 0


def test_an_item_that_waits_behind_busy_ranks_runs_out_of_time_not_of_ranks() -> None:
    router = dispatcher(cap=1)
    router.changed([rank(0)], [], 0)
    router.submit(key(0), 50, 0)
    router.submit(key(1), 10, 0)
    (end,) = router.tick(10)
    assert isinstance(end, Ended)
    assert (end.kind, end.text) == (FailureKind.DEADLINE, "out of time waiting for an encoder")


def test_cancelling_takes_every_item_of_one_attempt_and_no_other() -> None:
    router = dispatcher(cap=2)
    router.changed([rank(0)], [], 0)
    for item in (key(0), key(1, client=b"other"), key(2), key(3, attempt=2), key(4, request="s")):
        router.submit(item, 10, 0)
    actions = router.cancel(b"gateway", RequestId("r"), 1, 0)
    assert actions[0] == Cancel(rank(0), 1)
    assert ends(actions) == [(0, ItemState.CANCELLED, None), (2, ItemState.CANCELLED, None)]
    assert sends(actions) == [(3, "encoder/0")]
    assert router.cancel(b"gateway", RequestId("r"), 1, 0) == []
    assert router.encoded(1, rank(0), 0) == []


def test_the_same_item_again_is_the_same_item() -> None:
    router = dispatcher()
    router.changed([rank(0)], [], 0)
    router.submit(key(0), 10, 0)
    assert router.submit(key(0), 10, 0) == []
    assert len(router) == 1


def test_a_picture_goes_where_it_was_until_that_rank_has_four_more_than_the_least() -> None:
    router = dispatcher(cap=99, remember=9)
    router.changed([rank(0), rank(1)], [], 0)
    where = [sends(router.submit(key(number), 10, 0, "same"))[0][1] for number in range(7)]
    assert where == ["encoder/0"] * 4 + ["encoder/1"] * 3, "and the other one is the holder from then on"
    assert holder(router, "same") == rank(1)
    assert sends(router.submit(key(7), 10, 0, "other")) == [(7, "encoder/1")], "the least pending"
    assert sends(router.submit(key(8), 10, 0, "")) == [(8, "encoder/0")]
    assert holder(router, "") is None


def test_the_memory_of_a_rank_dies_with_its_incarnation() -> None:
    router = dispatcher(remember=9)
    router.changed([rank(0)], [], 0)
    router.submit(key(0), 10, 0, "a")
    router.encoded(1, rank(0), 0)
    assert holder(router, "a") == rank(0)
    router.changed([rank(0, 2), rank(1)], [rank(0)], 0)
    assert holder(router, "a") is None
    router.submit(key(1), 10, 0, "b")
    assert sends(router.submit(key(2), 10, 0, "a")) == [(2, "encoder/1")]


def test_an_item_that_moves_takes_the_memory_along_and_a_full_or_tried_holder_is_passed_over() -> None:
    router = dispatcher(cap=1, remember=1)
    router.changed([rank(0), rank(1)], [], 0)
    router.submit(key(0), 10, 0, "a")
    assert sends(router.submit(key(1), 10, 0, "a")) == [(1, "encoder/1")]
    router.encoded(2, rank(1), 0)
    assert sends(router.changed([], [rank(0)], 0)) == [(0, "encoder/1")]
    assert holder(router, "a") == rank(1)
    router.encoded(3, rank(1), 0)
    router.submit(key(2), 10, 0, "b")
    assert (holder(router, "a"), holder(router, "b")) == (None, rank(1)), "one picture is remembered here"


def test_where_ranks_keep_nothing_nothing_is_remembered() -> None:
    router = dispatcher(cap=9)
    router.changed([rank(0), rank(1)], [], 0)
    assert [sends(router.submit(key(n), 10, 0, "same"))[0][1] for n in range(2)] == ["encoder/0", "encoder/1"]


def test_ended_states_are_final_and_every_state_can_end() -> None:
    assert {before for before, _ in TRANSITIONS} == set(ItemState) - ENDED
    assert set(TRANSITIONS.values()) == set(ItemState)


@pytest.mark.parametrize(
    ("patches", "budget", "count"),
    [([], 10, 0), ([4, 4, 4], 10, 2), ([4, 6, 1], 10, 2), ([11, 1], 10, 1), ([1, 11, 1], 10, 1), ([3], 0, 1)],
)
def test_a_batch_is_what_fits_from_the_front(patches: list[int], budget: int, count: int) -> None:
    assert fitting(patches, budget) == count


class Walk(RuleBasedStateMachine):
    """A router's world, in any order: each item ends once and for a reason, no rank is over its cap, the queue stays
    bounded, nothing waits that could be sent, and everything is sent to whom it should be."""

    CAP, QUEUE, RANKS, REMEMBER, WAIT = 7, 3, 3, 2, 5

    def __init__(self) -> None:
        super().__init__()
        self.router = dispatcher(self.CAP, self.QUEUE, self.REMEMBER, self.WAIT)
        self.last: dict[str, RankKey] = {}  # who was given each picture last, the oldest news first
        self.contents: dict[ItemKey, str] = {}
        self.now = 0.0
        self.numbers = itertools.count()
        self.incarnations = Counter[int]()
        self.ready: dict[int, RankKey] = {}
        self.order: list[RankKey] = []  # of them: who was sent to longest ago is the first
        self.resting: set[RankKey] = set()
        self.leaving: set[RankKey] = set()
        self.cut: set[RankKey] = set()
        self.full: set[RankKey] = set()
        self.coming: frozenset[RankName] | None = None
        self.client_is_gone = False
        self.submitted: dict[ItemKey, float] = {}
        self.ended = Counter[ItemKey]()
        self.working: dict[int, tuple[RankKey, ItemKey]] = {}  # as the encoders see it
        self.dispatched: set[int] = set()
        self.lost: dict[ItemKey, set[RankName]] = {}
        self.alone: dict[ItemKey, float] = {}  # since when there is nobody that it may go to

    # -- the model --

    @property
    def open(self) -> list[RankKey]:
        return [to for to in self.order if to not in self.resting | self.leaving | self.cut]

    def may_go_to(self, item: ItemKey) -> list[RankKey]:
        return [to for to in self.open if to.rank not in self.lost[item]]

    def with_room(self, item: ItemKey) -> list[RankKey]:
        count = self.counts()
        return [to for to in self.may_go_to(item) if count[to] < self.CAP and to not in self.full]

    def counts(self) -> Counter[RankKey]:
        return Counter(to for to, _ in self.working.values())

    def queued(self) -> set[ItemKey]:
        return set(self.submitted) - set(self.ended) - {item for _, item in self.working.values()}

    def hopeless(self, item: ItemKey) -> bool:
        names = {to.rank for to in self.order} | (self.coming or frozenset())
        return names <= self.lost[item] and (self.coming is not None or bool(self.lost[item]))

    def drop(self, dispatch: int) -> tuple[RankKey, ItemKey]:
        """Its rank has room for another."""
        self.full.discard(self.working[dispatch][0])
        return self.working.pop(dispatch)

    def lose(self, left: list[RankKey]) -> None:
        for dispatch, (to, item) in list(self.working.items()):
            if to in left:
                self.drop(dispatch)
                self.lost[item].add(to.rank)

    def apply(self, actions: list[Action], *, abandoned: bool = False) -> None:
        for action in actions:
            match action:
                case Send():
                    self.sent(action)
                case Cancel():
                    if action.dispatch in self.working:  # not those of a connection that broke
                        assert self.drop(action.dispatch)[0] == action.to
                case Ended():
                    self.end(action, abandoned=abandoned)

    def sent(self, action: Send) -> None:
        assert action.dispatch not in self.dispatched, "a number was drawn twice"
        assert action.to in self.ready.values(), "sent to a rank that is not there"
        assert action.to.rank not in self.lost[action.item], "sent to a rank that it was lost with"
        assert action.seconds > 0
        self.choice_was_right(action)
        self.dispatched.add(action.dispatch)
        self.working[action.dispatch] = (action.to, action.item)
        self.order.remove(action.to)
        self.order.append(action.to)

    def end(self, action: Ended, *, abandoned: bool) -> None:
        self.ended[action.item] += 1
        for dispatch in [dispatch for dispatch, work in self.working.items() if work[1] == action.item]:
            self.drop(dispatch)
        if action.kind in (FailureKind.NO_RANK, FailureKind.RANK_LOST) and not abandoned:
            in_vain = self.now - self.alone.get(action.item, self.now) >= self.WAIT
            late = self.submitted[action.item] <= self.now and not self.open
            assert in_vain or late or self.hopeless(action.item), "given up although somebody may come"
        assert (
            len(action.lost) == len({to.rank for to in action.lost}) == len(self.lost[action.item]) or not action.kind
        )
        if action.state is ItemState.ENCODED:
            (self.router.undeliverable if self.client_is_gone else self.router.delivered)(action.item)

    def choice_was_right(self, sent: Send) -> None:
        """By the counts of the moment: the holder where it is not too busy, else the first of the least busy."""
        count = self.counts()
        open_to = self.with_room(sent.item)
        assert sent.to in open_to, "it takes nothing, or has no room"
        least = min(count[to] for to in open_to)
        content = self.contents[sent.item]
        holder = self.last.get(content)
        if holder in open_to and count[holder] - least < 4:
            assert sent.to == holder, "the one who has the picture was passed over"
        else:
            assert sent.to == next(to for to in open_to if count[to] == least), "somebody else's turn was due"
        if content:
            self.last.pop(content, None)
            self.last[content] = sent.to
            if len(self.last) > self.REMEMBER:
                del self.last[next(iter(self.last))]

    # -- what happens --

    @rule(life=st.integers(1, 8), request=st.sampled_from("abc"), content=st.sampled_from(["", "p", "q", "r"]))
    def submit(self, life: int, request: str, content: str) -> None:
        item = key(next(self.numbers), request)
        self.submitted[item] = self.now + life
        self.contents[item] = content
        self.lost[item] = set()
        self.apply(self.router.submit(item, self.now + life, self.now, content))

    numbers_of_ranks = st.integers(0, RANKS - 1)
    some_ranks = st.sets(numbers_of_ranks)

    @rule(join=some_ranks, leave=some_ranks, back=some_ranks, rest=some_ranks, coming=st.none() | some_ranks)
    def change(self, join: set[int], leave: set[int], back: set[int], rest: set[int], coming: set[int] | None) -> None:
        """``back``: these had been given up, and are there again as the same process."""
        left = [self.ready[number] for number in sorted(leave | back) if number in self.ready]
        self.lose(left)
        self.last = {content: to for content, to in self.last.items() if to not in left}
        for group in (self.resting, self.leaving, self.cut, self.full):
            group.difference_update(left)
        joined = [self.ready[number] for number in sorted(back - leave) if number in self.ready]
        for number in leave & set(self.ready):
            del self.ready[number]
        for number in sorted(join - set(self.ready)):
            self.incarnations[number] += 1
            self.ready[number] = rank(number, self.incarnations[number])
            joined.append(self.ready[number])
        self.order = [to for to in self.order if to not in left] + joined
        self.resting = {self.ready[number] for number in rest if number in self.ready}
        self.coming = None if coming is None else names(*coming) - {to.rank for to in self.order}
        outlook = None if self.coming is None else Outlook(self.coming)
        self.apply(self.router.changed(joined, left, self.now, self.resting, outlook))

    @rule(data=st.data(), how=st.sampled_from(["encoded", "failed", "refused", "full"]))
    def answer(self, data: st.DataObject, how: str) -> None:
        if not self.dispatched:
            return
        dispatch = data.draw(st.sampled_from(sorted(self.dispatched)))  # late and repeated ones too
        by, _ = self.working.get(dispatch, (rank(data.draw(st.integers(0, 2))), None))
        if dispatch in self.working and how in ("refused", "full"):
            self.drop(dispatch)
            (self.leaving if how == "refused" else self.full).add(by)
        match how:
            case "encoded":
                self.apply(self.router.encoded(dispatch, by, self.now))
            case "failed":
                self.apply(self.router.failed(dispatch, by, (FailureKind.BAD_MEDIA, "torn"), self.now))
            case "refused":
                self.apply(self.router.refused(dispatch, by, self.now))
            case _:
                self.apply(self.router.full(dispatch, by, self.now))

    @rule(number=numbers_of_ranks, stands=st.booleans())
    def connection(self, number: int, stands: bool) -> None:
        to = self.ready.get(number, rank(number))
        if stands:
            self.cut.discard(to)
            self.apply(self.router.mended(to, self.now))
        else:
            self.cut |= {to} & set(self.order)
            self.lose([to])
            self.apply(self.router.cut(to, self.now))

    @rule(request=st.sampled_from("abc"))
    def cancel(self, request: str) -> None:
        self.apply(self.router.cancel(b"gateway", RequestId(request), 1, self.now))

    @rule(gone=st.booleans())
    def client(self, gone: bool) -> None:
        self.client_is_gone = gone

    @rule()
    def abandon(self) -> None:
        self.apply(self.router.abandon("withdrawn"), abandoned=True)
        assert len(self.router) == 0

    @rule(seconds=st.integers(0, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        if seconds:
            self.full.clear()
        self.apply(self.router.tick(self.now))

    @invariant()
    def accounts_balance(self) -> None:
        self.router.check()
        assert max(self.ended.values(), default=0) <= 1, "an item ended twice"
        assert len(self.submitted) == len(self.ended) + len(self.router), "an item is lost"
        count = self.counts()
        for to in self.ready.values():
            assert count[to] == self.router.pending(to) <= self.CAP
        assert self.router.waiting == len(self.queued()) <= self.QUEUE + self.CAP * self.RANKS
        assert all(self.ended[item] for item, deadline in self.submitted.items() if deadline <= self.now)
        assert (self.router.next_deadline() or self.now + 1) > self.now, "it would ring at once, for ever"

    @invariant()
    def nothing_waits_for_nothing(self) -> None:
        queued = self.queued()
        assert not any(map(self.with_room, queued)), "somebody has room for it"
        assert not any(map(self.hopeless, queued)), "nobody is ever going to take it"
        lonely = {item for item in queued if not self.may_go_to(item)}
        self.alone = {item: self.alone.get(item, self.now) for item in lonely}
        assert all(self.now - since < self.WAIT for since in self.alone.values()), "it waited too long"

    def teardown(self) -> None:
        self.now += 100
        self.apply(self.router.tick(self.now))
        assert len(self.router) == 0
        assert set(self.ended.values()) <= {1}
        assert set(self.ended) == set(self.submitted)


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
