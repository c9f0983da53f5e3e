"""Memory for what is prepared: how much is expected, who waits, and that what leaves makes room."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epdctl.encoder.room import UNKNOWN_ROW_BYTES, Room
from epdctl.ids import Modality
from epdctl.wire.encode import MediaItem
from tests.support.ranks import run


def item(rows: int, modality: Modality = Modality.IMAGE) -> MediaItem:
    return MediaItem(index=0, modality=modality, content_hash="", of=1, grid=[1, 2, 2 * rows], rows=rows)


def test_what_a_medium_will_take_is_known_by_its_rows_from_those_of_its_kind() -> None:
    room = Room(1000)
    assert room.expect(item(3)) == 3 * UNKNOWN_ROW_BYTES
    room.learn(item(2), 20)
    room.learn(item(10), 50)
    assert room.expect(item(3)) == 30, "the most that was seen"
    assert room.expect(item(3, Modality.AUDIO)) == 3 * UNKNOWN_ROW_BYTES


def test_one_that_is_too_large_has_the_room_for_itself_and_nobody_overtakes_it() -> None:
    async def test() -> None:
        room = Room(100)
        room.learn(item(1), 10)
        entered: list[int] = []
        leave = [asyncio.Event() for _ in range(4)]

        async def visit(number: int, rows: int) -> None:
            async with room.hold(item(rows)):
                entered.append(number)
                await leave[number].wait()

        async with asyncio.TaskGroup() as group:
            visits = [group.create_task(visit(number, rows)) for number, rows in enumerate((5, 11, 1, 1))]
            await turns()
            assert (entered, room.held, room.waiting) == ([0], 50, 3)
            leave[0].set()
            await turns()
            assert (entered, room.held, room.waiting) == ([0, 1], 110, 2)
            visits[2].cancel()
            leave[1].set()
            await turns()
            assert (entered, room.held, room.waiting) == ([0, 1, 3], 10, 0)
            leave[3].set()
        assert room.held == 0

    run(test())


def test_what_it_really_took_is_what_counts_and_what_is_left_over_is_given_on() -> None:
    async def test() -> None:
        room = Room(100)
        room.learn(item(1), 10)
        async with AsyncExitStack() as stack:
            took = await stack.enter_async_context(room.hold(item(8)))
            waiting = asyncio.ensure_future(stack.enter_async_context(room.hold(item(4))))
            await turns()
            assert room.waiting == 1
            took(60)
            await waiting
            assert room.held == 100
            took(70)
            assert room.expect(item(1)) == 10, "no more for each row than was seen before"
        assert room.held == 0
        with pytest.raises(ZeroDivisionError):
            async with room.hold(item(4)):
                raise ZeroDivisionError
        assert room.held == 0

    run(test())


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), max_size=12), cancelled=st.sets(st.integers(0, 11)))
def test_whoever_comes_and_goes_it_is_never_over_its_limit_and_ends_empty(
    sizes: list[int], cancelled: set[int]
) -> None:
    async def test() -> None:
        room = Room(100)
        room.learn(item(1), 10)

        async def visit(rows: int) -> None:
            async with room.hold(item(rows)) as took:
                await asyncio.sleep(0)
                took(rows * 9)
                assert room.held <= 100 or room.held == rows * 9
                await asyncio.sleep(0)

        visits = [asyncio.ensure_future(visit(rows)) for rows in sizes]
        await asyncio.sleep(0)
        for number in cancelled & set(range(len(visits))):
            visits[number].cancel()
        for end in await asyncio.gather(*visits, return_exceptions=True):
            assert end is None or isinstance(end, asyncio.CancelledError)
        assert (room.held, room.waiting) == (0, 0)

    run(test())


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
