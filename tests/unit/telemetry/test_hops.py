"""What a rank notes of requests, by a clock that the test winds."""

from __future__ import annotations

import pytest

from epdctl.ids import RequestId
from epdctl.telemetry.hops import Hops
from epdctl.wire.trace import Hop, Kind

ONE = RequestId("r1")


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 10
        return self.now


def told(hops: list[Hop]) -> list[tuple[str, int, int | None]]:
    return [(hop.name, hop.began, hop.ended) for hop in hops]


def test_a_hop_ends_where_the_next_begins() -> None:
    hops = Hops(Clock())
    hops.start()
    way = hops.begin(Kind.DECODE, ONE, "waiting", attempt=2, item=3)
    way.enter("running")
    way.within("step", 21, 22)
    way.within("so far")
    way.end()
    listed = hops.stop()
    assert told(listed.hops) == [
        ("waiting", 10, 20),
        ("step", 21, 22),
        ("so far", 20, 30),
        ("running", 20, 40),
    ]
    assert {(hop.kind, hop.request, hop.attempt, hop.item) for hop in listed.hops} == {(Kind.DECODE, ONE, 2, 3)}
    assert [hop.inner for hop in listed.hops] == [False, True, True, False]
    hops.check(Kind.DECODE)


def test_without_a_capture_nothing_is_kept_and_where_it_is_is_known_all_the_same() -> None:
    """The hop that stalls began before anybody thought of recording, and has not ended when they stop."""
    hops = Hops(Clock())
    gone, stuck = hops.begin(Kind.ITEM, ONE, "queued"), hops.begin(Kind.REQUEST, ONE, "received")
    gone.enter("dispatched")
    gone.end()
    stuck.enter("encoding")
    hops.start()
    assert told(hops.stop().hops) == [("encoding", 50, None)]
    with pytest.raises(AssertionError, match="encoding"):
        hops.check(Kind.REQUEST)
    hops.check(Kind.ITEM)
    stuck.end()
    assert hops.stop().hops == []


def test_a_way_that_has_ended_notes_nothing_more() -> None:
    hops = Hops(Clock())
    hops.start()
    way = hops.begin(Kind.DECODE, ONE, "waiting")
    way.end()
    way.end()
    way.within("late", 1, 2)
    assert [hop.name for hop in hops.stop().hops] == ["waiting"]


def test_what_is_kept_is_bounded_and_what_is_left_out_is_counted() -> None:
    hops = Hops(Clock(), most=10)
    hops.start()
    way = hops.begin(Kind.DECODE, ONE, "running")
    for _ in range(100):
        way.within("step", 1, 2)
    way.end()
    listed = hops.stop()
    assert [hop.name for hop in listed.hops] == ["step"] * 8 + ["running"], "the state finds room beside its steps"
    assert listed.left_out == 92
    hops.start()
    assert hops.stop().left_out == 0
