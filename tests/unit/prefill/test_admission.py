"""Admission as pure values: random walks over a rank with pages and an embedding pool."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epdctl.engine.pages import PageAllocator
from epdctl.errors import PoolExhausted
from epdctl.rank.admission import Capacity, Line, Need
from epdctl.transfer.allocators import ALIGNMENT, RangeAllocator
from epdctl.wire.encode import FailureKind
from epdctl.wire.transfer import Extent

PAGES, SLOTS, QUEUE = 8, 6 * ALIGNMENT, 5

needs = st.builds(
    Need,
    st.integers(0, PAGES + 2),
    st.lists(st.integers(0, 3 * ALIGNMENT), max_size=3).map(tuple),
)
moves = st.one_of(
    st.tuples(st.just("join"), needs),
    st.tuples(st.just("leave"), st.integers(0, 30)),
    st.tuples(st.just("end"), st.integers(0, 30)),
)


@dataclass
class Held:
    pages: tuple[int, ...]
    slots: list[tuple[Extent]]


@dataclass
class World:
    """A rank's memory, who waits for it, and who has it."""

    pages: PageAllocator = field(default_factory=lambda: PageAllocator(PAGES))
    slots: RangeAllocator = field(default_factory=lambda: RangeAllocator(SLOTS))
    line: Line[int] = field(default_factory=lambda: Line(QUEUE))
    needs: dict[int, Need] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    running: dict[int, Held] = field(default_factory=dict)

    def take(self, name: int) -> Held | None:
        need = self.needs[name]
        slots: list[tuple[Extent]] = []
        try:
            slots.extend(self.slots.take(nbytes) for nbytes in need.slots)
            return Held(self.pages.take(need.pages), slots)
        except PoolExhausted:
            for slot in slots:
                self.slots.give(slot)
            return None

    def join(self, need: Need) -> None:
        name = len(self.needs)
        self.needs[name] = need
        if Capacity(PAGES, SLOTS).refusal(need) is not None:
            assert need.pages > PAGES or sum(need.slots) + len(need.slots) * ALIGNMENT > SLOTS
            return
        refusal = self.line.join(name)
        assert (refusal is not None) == (len(self.waiting) == QUEUE)
        if refusal is None:
            self.waiting.append(name)

    def leave(self, number: int) -> None:
        if self.waiting:
            name = self.waiting.pop(number % len(self.waiting))
            self.line.leave(name)

    def end(self, number: int) -> None:
        if self.running:
            held = self.running.pop(list(self.running)[number % len(self.running)])
            self.pages.give(held.pages)
            for slot in held.slots:
                self.slots.give(slot)

    def serve(self) -> None:
        for name, held in self.line.serve(self.take):
            assert name == self.waiting.pop(0), "somebody overtook"
            need = self.needs[name]
            assert len(held.pages) == need.pages, "a part was granted"
            assert [slot[0].nbytes for slot in held.slots] == list(need.slots)
            self.running[name] = held

    def check(self) -> None:
        self.pages.check()
        self.slots.check()
        assert self.pages.free == PAGES - sum(len(held.pages) for held in self.running.values())
        assert len(self.line) == len(self.waiting)
        assert self.running or not self.waiting, "all wait and nobody runs: a deadlock"


@settings(max_examples=300, deadline=None)
@given(st.lists(moves, max_size=40))
def test_no_walk_loses_memory_overtakes_or_deadlocks(walk: list[tuple[str, object]]) -> None:
    world = World()
    for move, argument in walk:
        getattr(world, move)(argument)
        world.serve()
        world.check()
    while world.running:  # everyone who was let in is served in the end
        world.end(0)
        world.serve()
        world.check()
    assert not world.waiting
    assert world.pages.free == PAGES
    assert world.slots.free == SLOTS


def test_what_no_empty_rank_could_hold_is_refused_with_numbers() -> None:
    capacity = Capacity(pages=4, slot_bytes=ALIGNMENT)
    assert capacity.refusal(Need(4, (ALIGNMENT,))) is None
    pages = capacity.refusal(Need(5))
    assert pages is not None
    assert pages.kind is FailureKind.TOO_LARGE
    assert "5 KV pages; this rank has 4" in pages.text
    slots = capacity.refusal(Need(1, (ALIGNMENT, 1)))
    assert slots is not None
    assert f"need {2 * ALIGNMENT} bytes" in slots.text


def test_a_full_line_says_so() -> None:
    line: Line[str] = Line(1)
    assert line.join("a") is None
    refusal = line.join("b")
    assert refusal is not None
    assert refusal.kind is FailureKind.FULL
    line.leave("a")
    assert line.join("b") is None


def test_the_head_of_the_line_is_not_overtaken_by_one_that_would_fit() -> None:
    line: Line[int] = Line(9)
    for size in (1, 5, 1):
        line.join(size if size not in line else 2)
    room = [3]

    def take(size: int) -> int | None:
        if size > room[0]:
            return None
        room[0] -= size
        return size

    assert [name for name, _ in line.serve(take)] == [1]
    assert len(line) == 2


@pytest.mark.parametrize("name", ["nobody"])
def test_leaving_a_line_one_is_not_in_is_fine(name: str) -> None:
    line: Line[str] = Line(1)
    line.leave(name)
    assert name not in line


def test_a_refusal_names_what_can_be_written_in_a_topology() -> None:
    room = Capacity(pages=4, slot_bytes=512, stage="decode")
    pages, slots = room.refusal(Need(5)), room.refusal(Need(1, (1024,)))
    assert pages is not None
    assert slots is not None
    assert "stages.decode.kv_tokens" in pages.text
    assert "transfer.embedding_pool" in slots.text
