"""Offsets of clocks from exchanges, on clocks that are numbers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epdctl.ids import Incarnation, RankName
from epdctl.supervisor.clocks import EXCHANGES, Clocks, Exchange, best
from epdctl.wire.lifecycle import ClockTold, TellClock

RANK, FIRST = RankName("decode/0"), Incarnation(1)

way = st.integers(0, 10**9)


def exchange(ahead: int, there: int, within: int, back: int) -> Exchange:
    """True time starts at 0; the rank's clock is ``ahead`` of it."""
    return Exchange(0, there + ahead, there + within + ahead, there + within + back)


@given(ahead=st.integers(-(10**12), 10**12), ways=st.lists(st.tuples(way, way, way), min_size=1))
def test_the_true_offset_is_never_further_off_than_the_uncertainty(
    ahead: int, ways: list[tuple[int, int, int]]
) -> None:
    found = best(exchange(ahead, *each) for each in ways)
    assert found is not None
    assert abs(found.us - ahead / 1000) <= found.uncertainty_us + 1e-3
    assert found.uncertainty_us == pytest.approx(min(there + back for there, _, back in ways) / 2000)


def test_an_exchange_that_took_less_than_nothing_does_not_count() -> None:
    impossible = Exchange(asked=100, heard=0, told=50, received=120)
    assert best([impossible]) is None
    fair = exchange(7_000, 10, 10, 10)
    assert best([impossible, fair]) == best([fair])


@dataclass
class Wire:
    """Answers when it is told to, from a clock that is ahead of ours."""

    ahead: int = 3_000_000
    now: int = 0
    asked: list[TellClock] = field(default_factory=list)

    def tell(self, rank: RankName, message: TellClock) -> None:
        self.asked.append(message)

    def answer(self, clocks: Clocks, there: int, back: int) -> None:
        self.now += there
        heard = self.now + self.ahead
        self.now += back
        clocks.told(RANK, FIRST, ClockTold(asked=self.asked[-1].asked, heard=heard, told=heard))


def test_each_question_waits_for_the_answer_before_it_and_the_quickest_counts() -> None:
    async def scenario() -> None:
        wire = Wire()
        clocks = Clocks(wire.tell, lambda: wire.now)
        clocks.ask(RANK, FIRST)
        for number in range(EXCHANGES):
            assert len(wire.asked) == number + 1
            wire.answer(clocks, 1000 + number, 5000 - 100 * number)
        assert len(wire.asked) == EXCHANGES
        await clocks.settle()
        offset = clocks.offset(RANK, FIRST)
        assert offset is not None
        assert offset.uncertainty_us == (1000 + 5000 - 99 * (EXCHANGES - 1)) / 2000
        assert abs(offset.us - 3000) <= offset.uncertainty_us
        assert clocks.offset(RANK, Incarnation(2)) is None

    asyncio.run(scenario())


def test_a_rank_that_does_not_answer_has_no_offset_and_holds_nobody_up() -> None:
    async def scenario() -> None:
        wire = Wire()
        clocks = Clocks(wire.tell, lambda: wire.now)
        clocks.ask(RANK, FIRST)
        clocks.ask(RankName("encoder/0"), FIRST)
        clocks.gone(RankName("encoder/0"), FIRST)
        await clocks.settle(0.01)
        assert clocks.offset(RANK, FIRST) is None
        wire.answer(clocks, 1, 1)
        assert clocks.offset(RANK, FIRST) is None, "it was given up"

    asyncio.run(scenario())
