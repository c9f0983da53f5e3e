"""Lanes and arrows of hops that are only numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from epdctl.ids import RequestId
from epdctl.telemetry.tracks import Placed, arrows, lanes
from epdctl.wire.trace import Hop, Kind


def hop(
    kind: Kind, name: str, began: int, ended: int | None, *, way: int = 1, item: int | None = None, attempt: int = 1
) -> Hop:
    return Hop(
        kind=kind, request=RequestId("r1"), attempt=attempt, item=item, way=way, name=name, began=began, ended=ended
    )


def placed(rank: int, hop: Hop, uncertainty: float = 0.0) -> Placed:
    return Placed(rank, 0, hop, hop.began, hop.began if hop.ended is None else hop.ended, uncertainty)


spans = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), max_size=30)


@given(spans)
def test_ways_share_a_lane_only_one_after_another(spans: list[tuple[int, int]]) -> None:
    hops = [hop(Kind.DECODE, "waiting", at, at + for_, way=way) for way, (at, for_) in enumerate(spans)]
    chosen = lanes(hops, until=200)
    for way, (at, for_) in enumerate(spans):
        for other in range(way):
            if chosen[other] == chosen[way]:
                begins, lasts = spans[other]
                assert at + for_ <= begins or begins + lasts <= at
    busiest = max((sum(a <= at < a + n for a, n in spans) for at in range(121)), default=0)
    assert len(set(chosen.values())) <= max(busiest, bool(spans)) + sum(n == 0 for _, n in spans)


def test_what_has_not_ended_keeps_its_lane_to_the_end() -> None:
    hops = [hop(Kind.DECODE, "waiting", 0, None, way=1), hop(Kind.DECODE, "waiting", 50, 60, way=2)]
    assert lanes(hops, until=100) == {1: 0, 2: 1}


def test_two_pictures_lead_to_one_prompt_each_by_its_own_arrow() -> None:
    there = [
        placed(1, hop(Kind.ITEM, "queued", 10, 20, way=1, item=0)),
        placed(1, hop(Kind.ITEM, "queued", 11, 21, way=2, item=1)),
        placed(2, hop(Kind.ENCODE, "preparing", 30, 40, item=1)),
        placed(3, hop(Kind.ENCODE, "preparing", 31, 40, item=0)),
        placed(2, hop(Kind.ENCODE, "writing", 50, 60, item=1)),
        placed(3, hop(Kind.ENCODE, "writing", 51, 61, item=0)),
        placed(4, hop(Kind.PREFILL, "running", 62, 70)),
    ]
    drawn = {(arrow.source.rank, arrow.source.hop.item, arrow.target.rank) for arrow in arrows(there)}
    assert drawn == {(1, 0, 3), (1, 1, 2), (2, 1, 4), (3, 0, 4)}


def test_attempts_do_not_mix_and_the_latest_try_before_counts() -> None:
    there = [
        placed(0, hop(Kind.REQUEST, "received", 0, 10)),
        placed(0, hop(Kind.REQUEST, "received", 100, 110, attempt=2)),
        placed(1, hop(Kind.DECODE, "waiting", 111, 120, attempt=2)),
        placed(2, hop(Kind.ITEM, "queued", 121, 122, way=1, item=0, attempt=2)),
        placed(2, hop(Kind.ITEM, "queued", 131, 132, way=2, item=0, attempt=2)),
        placed(3, hop(Kind.ENCODE, "preparing", 133, 140, item=0, attempt=2)),
    ]
    assert [(arrow.source.began, arrow.target.began) for arrow in arrows(there)] == [(100, 111), (131, 133)]


def test_an_arrow_against_time_is_told_from_clocks_that_are_not_sure() -> None:
    def backwards(uncertainty: float) -> list[bool]:
        there = [
            placed(0, hop(Kind.PREFILL, "running", 1000, 1100), uncertainty),
            placed(1, hop(Kind.DECODE, "running", 500, 600), uncertainty),
        ]
        return [arrow.backwards for arrow in arrows(there)]

    assert (backwards(100.0), backwards(300.0)) == ([True], [False])
