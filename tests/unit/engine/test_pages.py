"""Pages are free or taken, and never both."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epdctl.engine.pages import PageAllocator, pages_for
from epdctl.errors import PoolExhausted


def test_all_or_nothing() -> None:
    allocator = PageAllocator(4)
    taken = allocator.take(3)
    with pytest.raises(PoolExhausted, match="2 KV pages wanted, 1 of 4"):
        allocator.take(2)
    assert allocator.free == 1
    allocator.give(taken)
    assert sorted(allocator.take(4)) == [0, 1, 2, 3]


def test_the_lowest_pages_go_first_so_that_they_lie_side_by_side() -> None:
    allocator = PageAllocator(8)
    first, second = allocator.take(3), allocator.take(3)
    allocator.give(second)
    allocator.give(tuple(reversed(first)))
    assert allocator.take(6) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("pages", [(0,), (1, 1), (99,)])
def test_giving_back_what_one_does_not_have_changes_nothing(pages: tuple[int, ...]) -> None:
    allocator = PageAllocator(4)
    allocator.take(3)
    allocator.give((0,))
    with pytest.raises(ValueError, match="nobody has"):
        allocator.give(pages)
    assert allocator.free == 2
    allocator.check()


@given(st.integers(1, 40), st.lists(st.integers(0, 12), max_size=60), st.randoms())
def test_a_walk_never_hands_a_page_out_twice(total: int, wishes: list[int], draw: random.Random) -> None:
    allocator, held = PageAllocator(total), list[tuple[int, ...]]()
    for wish in wishes:
        if wish <= allocator.free:
            held.append(allocator.take(wish))
        elif held:
            allocator.give(held.pop(draw.randrange(len(held))))
        pages = [page for each in held for page in each]
        assert len(pages) == len(set(pages)) == total - allocator.free
        allocator.check()


def test_check_sees_a_lost_page() -> None:
    allocator = PageAllocator(3)
    allocator._free.pop()
    with pytest.raises(AssertionError, match="3 pages"):
        allocator.check()


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 16) == pages
