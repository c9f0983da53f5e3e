"""What a step computes: everyone who writes an answer, and as much of the prompts as fits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from epdctl.engine.scheduler import Slice, Work, schedule

COUNTS = st.tuples(st.integers(0, 40), st.integers(1, 40))
WORKS = st.lists(COUNTS, max_size=20).map(
    lambda pairs: [Work(str(i), computed, computed + left) for i, (computed, left) in enumerate(pairs)]
)
SHAPES = st.tuples(st.integers(1, 48), st.integers(1, 12))


def test_answers_go_first_and_prompts_share_what_is_left() -> None:
    work = [Work("long", 0, 100), Work("answer", 30, 31), Work("next", 0, 50)]
    assert schedule(work, chunk_tokens=111, max_batch=8) == [
        Slice("answer", 30, 1),
        Slice("long", 0, 100),
        Slice("next", 0, 10),
    ]


def test_the_oldest_prompt_moves_however_many_answers_there_are() -> None:
    work = [*(Work(f"answer {i}", 9, 10) for i in range(20)), Work("prompt", 3, 50), Work("younger", 0, 5)]
    slices = schedule(work, chunk_tokens=8, max_batch=64)
    assert len(slices) == 21
    assert slices[-1] == Slice("prompt", 3, 1)


def test_nobody_without_a_seat_is_computed() -> None:
    work = [Work("a", 5, 6), Work("b", 0, 9), Work("c", 7, 8)]
    assert [each.id for each in schedule(work, chunk_tokens=64, max_batch=2)] == ["a", "b"]


@given(WORKS, SHAPES)
def test_budgets_and_borders_hold(work: list[Work], shapes: tuple[int, int]) -> None:
    chunk_tokens, max_batch = shapes
    slices = schedule(work, chunk_tokens=chunk_tokens, max_batch=max_batch)
    by_id = {each.id: each for each in work}
    answers = [each for each in work[:max_batch] if each.left == 1]
    assert len({each.id for each in slices}) == len(slices) <= max_batch
    assert all(each.start == by_id[each.id].computed for each in slices)
    assert all(1 <= each.count <= by_id[each.id].left for each in slices)
    assert sum(each.count for each in slices) <= max(chunk_tokens, len(answers) + 1)
    assert {each.id for each in answers} <= {each.id for each in slices}
    assert bool(slices) == bool(work)


@given(WORKS, SHAPES, st.integers(0, 6))
def test_everyone_ends_within_a_bound_and_answers_never_wait(
    work: list[Work], shapes: tuple[int, int], answer: int
) -> None:
    """A seat moves in each step or stands behind an older prompt that does: prompts plus answers bound the steps."""
    chunk_tokens, max_batch = shapes
    to_say = {each.id: answer for each in work}
    bound = sum(each.left + answer for each in work)
    steps = 0
    while work:
        steps += 1
        assert steps <= bound
        slices = {each.id: each for each in schedule(work, chunk_tokens=chunk_tokens, max_batch=max_batch)}
        work = [moved for each in work if (moved := _move(each, slices.get(each.id), to_say)) is not None]


def _move(work: Work, done: Slice | None, to_say: dict[str, int]) -> Work | None:
    if done is None:
        return work
    moved = replace(work, computed=done.start + done.count)
    if moved.left:
        return moved
    to_say[work.id] -= 1
    return replace(moved, known=moved.known + 1) if to_say[work.id] >= 0 else None
