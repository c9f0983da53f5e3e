"""Leases and allocators: every transition that is not in the table raises, and no byte is ever owned twice."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from epdctl.errors import LeaseExpired, PoolExhausted, QuarantineFull, SlotBusy, StaleGeneration, TransferError
from epdctl.transfer.allocators import ALIGNMENT, PageExtents, RangeAllocator
from epdctl.transfer.leases import TRANSITIONS, Lease, LeaseTable, SlotEvent, SlotState
from epdctl.transfer.pool import GRACE_SECONDS, Pool
from epdctl.wire.transfer import Extent, TensorSpec


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pool_of(nbytes: int, clock: Clock | None = None) -> Pool:
    memory = torch.full((nbytes,), 7, dtype=torch.uint8)
    return Pool("embeddings", memory, RangeAllocator(nbytes), clock=clock or Clock())


PATHS = {  # a way to bring a fresh lease into each state
    SlotState.LEASED: [],
    SlotState.FILLING: [SlotEvent.WRITE],
    SlotState.READY: [SlotEvent.FILL],
    SlotState.IN_FLIGHT: [SlotEvent.FILL, SlotEvent.HOLD],
    SlotState.QUARANTINED: [SlotEvent.WRITE, SlotEvent.FENCE],
    SlotState.FREE: [SlotEvent.RELEASE],
}


@pytest.mark.parametrize("event", SlotEvent)
@pytest.mark.parametrize("state", SlotState)
def test_the_table_is_the_whole_truth(state: SlotState, event: SlotEvent) -> None:
    table = LeaseTable(Clock())
    lease = table.grant([Extent(offset=0, nbytes=8)], "request", seconds=1.0)
    for step in PATHS[state]:
        table.move(lease.id, step)
    assert table.state(lease.id) is state
    expected = TRANSITIONS.get((state, event))
    if expected is None or state is SlotState.FREE:
        with pytest.raises(TransferError, match="not possible"):
            table.move(lease.id, event)
        assert table.state(lease.id) is state
    else:
        assert table.move(lease.id, event) is expected
    table.check()


def test_every_state_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS.values()) == set(SlotState)
    assert {before for before, _ in TRANSITIONS} == set(SlotState)


def test_generations_are_drawn_anew_and_a_former_one_is_stale() -> None:
    drawn = itertools.count(1000)
    table = LeaseTable(Clock(), lambda: next(drawn))
    extent = Extent(offset=0, nbytes=8)
    first = table.grant([extent], "a", seconds=1.0)
    table.move(first.id, SlotEvent.RELEASE)
    second = table.grant([extent], "b", seconds=1.0)
    assert second.generation != first.generation
    for lease, generation in ((first.id, first.generation), (second.id, first.generation), (99, 1)):
        with pytest.raises(StaleGeneration):
            table.landing(lease, generation)
    assert table.landing(second.id, second.generation) == (extent,)
    assert len({LeaseTable().grant([extent], "c", seconds=1.0).generation for _ in range(20)}) == 20


def test_landing_marks_filling_expires_on_the_dot_and_is_empty_once_filled() -> None:
    clock = Clock()
    pool = pool_of(1024, clock)
    lease, late = pool.lease(100, "r", seconds=5.0), pool.lease(100, "r", seconds=5.0)
    clock.now += 4.999
    assert pool.landing(lease.id, lease.generation) == lease.extents
    assert pool.leases.state(lease.id) is SlotState.FILLING
    assert pool.filled(lease.id, lease.generation) == lease
    assert pool.filled(lease.id, lease.generation) == lease
    clock.now += 0.001
    assert pool.landing(lease.id, lease.generation) == ()
    with pytest.raises(LeaseExpired, match="of r expired"):
        pool.landing(late.id, late.generation)
    pool.release(late.id)
    with pytest.raises(StaleGeneration):
        pool.landing(late.id, late.generation)
    pool.release(lease.id)
    assert pool.allocator.free == pool.allocator.total


def test_a_slot_being_read_cannot_be_released() -> None:
    pool = pool_of(1024)
    lease = pool.lease(10, "r", seconds=1.0)
    pool.filled(lease.id, lease.generation)
    pool.hold(lease.id)
    with pytest.raises(TransferError, match="in-flight"):
        pool.release(lease.id)
    pool.let_go(lease.id)
    pool.release(lease.id)
    with pytest.raises(TransferError, match="is free"):
        pool.release(lease.id)


def test_a_slot_that_ends_with_a_writer_inside_is_quarantined_until_the_last_one_has_left() -> None:
    pool = pool_of(512)
    freed: list[int] = []
    pool.freed = lambda: freed.append(pool.allocator.free)
    lease = pool.lease(512, "r", seconds=1.0)
    for _ in range(2):
        assert pool.enter(lease.id, lease.generation, "encoder/0.1") == lease.extents
    with pytest.raises(SlotBusy, match=r"encoder/0\.1 has not stopped"):
        pool.enter(lease.id, lease.generation, "encoder/1.1")
    with pytest.raises(SlotBusy, match="still writing"):
        pool.filled(lease.id, lease.generation)
    pool.release(lease.id)
    assert (pool.quarantined_bytes, pool.allocator.free) == (512, 0)
    for late in (pool.landing, pool.filled):
        with pytest.raises(StaleGeneration):
            late(lease.id, lease.generation)
    with pytest.raises(StaleGeneration):
        pool.enter(lease.id, lease.generation, "encoder/0.1")
    pool.leave(lease.id, "encoder/0.1")
    assert pool.quarantined_bytes == 512
    pool.leave(lease.id, "encoder/0.1")
    assert (pool.quarantined_bytes, freed) == (0, [512])
    pool.check()


def test_a_slot_that_nobody_writes_to_is_free_at_once() -> None:
    pool = pool_of(512)
    lease = pool.lease(512, "r", seconds=1.0)
    pool.enter(lease.id, lease.generation, "encoder/0.1")
    pool.leave(lease.id, "encoder/0.1")
    pool.release(lease.id)
    assert pool.allocator.free == 512
    filled = pool.lease(512, "r", seconds=1.0)
    pool.filled(filled.id, filled.generation)
    assert pool.enter(filled.id, filled.generation, "encoder/0.1") == ()
    pool.release(filled.id)
    assert pool.allocator.free == 512


def test_too_much_quarantine_is_said_with_who_caused_it() -> None:
    clock = Clock()
    pool = pool_of(4096, clock)
    leases = pool.lease_all([1024, 256], "r", seconds=1.0)
    for lease in leases:
        pool.enter(lease.id, lease.generation, "encoder/0.1")
    pool.release(leases[0].id)
    clock.now += GRACE_SECONDS
    pool.bound_quarantine()
    pool.release(leases[1].id)
    clock.now += GRACE_SECONDS
    with pytest.raises(QuarantineFull, match=r"1280 of 4096 bytes of the embeddings pool.*encoder/0.1"):
        pool.bound_quarantine()


def test_a_quarantine_counts_when_it_has_lasted_and_not_while_a_dead_writer_s_bytes_settle() -> None:
    """A writer that lives says in a moment that it stopped; one that died settles by itself."""
    clock = Clock()
    pool = pool_of(4096, clock)
    lease, other = pool.lease_all([2048, 2048], "r", seconds=1.0)
    pool.enter(lease.id, lease.generation, "encoder/0.1")
    pool.enter(other.id, other.generation, "encoder/1.1")
    pool.release(lease.id)
    pool.bound_quarantine()
    clock.now += GRACE_SECONDS - 1
    pool.bound_quarantine()
    pool.dying(lease.id)
    pool.dying(other.id)
    clock.now += GRACE_SECONDS - 1
    pool.release(other.id)
    pool.bound_quarantine()
    pool.check()
    clock.now += 1
    with pytest.raises(QuarantineFull, match=r"2048 of 4096 bytes .* for more than 30 s: encoder/0.1 began"):
        pool.bound_quarantine()
    pool.leave(lease.id, "encoder/0.1")
    pool.leave(other.id, "encoder/1.1")
    clock.now += GRACE_SECONDS
    pool.bound_quarantine()
    pool.check()


def test_a_grant_of_several_slots_is_all_or_nothing() -> None:
    pool = pool_of(1024)
    with pytest.raises(PoolExhausted):
        pool.lease_all([256, 256, 600], "r", seconds=1.0)
    assert pool.allocator.free == 1024
    assert len(pool.leases) == 0
    leases = pool.lease_all([256, 256, 512], "r", seconds=1.0)
    assert [lease.owner for lease in leases] == ["r"] * 3
    assert pool.allocator.free == 0
    pool.check()


def test_a_pool_is_zeroed_and_wants_plain_bytes() -> None:
    assert not pool_of(512).memory.any()
    for memory in (torch.zeros(8), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]):
        with pytest.raises(TransferError, match="1-D uint8"):
            Pool("p", memory, RangeAllocator(8))


def test_a_slot_reads_as_the_tensor_that_was_promised() -> None:
    pool = pool_of(1024)
    lease = pool.lease(24, "r", seconds=1.0)
    start = lease.extents[0].offset
    values = torch.arange(6, dtype=torch.float32)
    pool.memory[start : start + 24] = values.view(torch.uint8)
    spec = TensorSpec(dtype="float32", shape=[2, 3], nbytes=24)
    assert torch.equal(pool.tensor(lease, spec), values.view(2, 3))
    for wrong in (
        TensorSpec(dtype="float32", shape=[7], nbytes=28),
        TensorSpec(dtype="float32", shape=[2, 3], nbytes=20),
        TensorSpec(dtype="float32", shape=[-2, -3], nbytes=24),
        TensorSpec(dtype="save", shape=[6], nbytes=24),
    ):
        with pytest.raises(TransferError):
            pool.tensor(lease, wrong)


def test_pages_become_extents_in_the_order_taken_and_neighbours_one() -> None:
    class Stack:
        total = 4

        def __init__(self) -> None:
            self.pages = [3, 0, 2, 1]

        @property
        def free(self) -> int:
            return len(self.pages)

        def take(self, count: int) -> list[int]:
            return [self.pages.pop() for _ in range(count)]

        def give(self, pages: object) -> None:
            assert isinstance(pages, list)
            self.pages.extend(pages)

    allocator = PageExtents(Stack(), 64)
    pool = Pool("kv", torch.zeros(256, dtype=torch.uint8), allocator)
    lease = pool.lease(3, "r", seconds=1.0)
    assert [(extent.offset, extent.nbytes) for extent in lease.extents] == [(64, 128), (0, 64)]
    assert allocator.held(lease.extents) == 3
    assert allocator.pages_of(lease.extents) == [1, 2, 0]
    pool.check()
    assert (allocator.free, allocator.total, lease.nbytes) == (1, 4, 192)
    pool.release(lease.id)
    assert allocator.free == 4


def test_a_range_that_was_taken_and_never_leased_is_found() -> None:
    pool = pool_of(1024)
    pool.lease(1, "r", seconds=1.0)
    pool.check()
    lost = pool.allocator.take(1)
    with pytest.raises(AssertionError, match="neither free nor leased"):
        pool.check()
    pool.allocator.give(lost)
    pool.check()


def test_gaps_join_on_both_sides() -> None:
    allocator = RangeAllocator(4 * ALIGNMENT)
    a, b, c, d = (allocator.take(1) for _ in range(4))
    for taken in (b, d, a, c):
        allocator.give(taken)
        allocator.check()
    assert allocator.take(4 * ALIGNMENT)[0].offset == 0
    with pytest.raises(PoolExhausted, match="0 of 1024 are free"):
        allocator.take(1)
    with pytest.raises(TransferError, match="nothing was taken"):
        allocator.give(b)


class PoolWalk(RuleBasedStateMachine):
    """Random leases, landings, expiries and releases: no overlap, nothing lost, whatever the order."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ranges = RangeAllocator(16 * ALIGNMENT)
        self.pool = Pool("p", torch.zeros(16 * ALIGNMENT, dtype=torch.uint8), self.ranges, clock=self.clock)
        self.inside: list[Lease] = []

    @rule(target=leases, sizes=st.lists(st.integers(0, 5 * ALIGNMENT), min_size=1, max_size=3), life=st.integers(1, 9))
    def grant(self, sizes: list[int], life: int) -> tuple[Lease, ...]:
        free = self.ranges.free
        try:
            return tuple(self.pool.lease_all(sizes, "r", seconds=life))
        except PoolExhausted:
            assert self.ranges.free == free
            return ()

    @rule(group=leases)
    def land(self, group: tuple[Lease, ...]) -> None:
        for lease in group:
            before = self.pool.leases.state(lease.id)
            try:
                extents = self.pool.landing(lease.id, lease.generation)
            except StaleGeneration:
                assert before in (SlotState.FREE, SlotState.QUARANTINED)
            except LeaseExpired:
                assert self.clock.now >= lease.expires_at
            else:
                assert bool(extents) == (before in (SlotState.LEASED, SlotState.FILLING))

    @rule(group=leases, event=st.sampled_from(["filled", "hold", "let_go", "release"]))
    def move(self, group: tuple[Lease, ...], event: str) -> None:
        for lease in group:
            before = self.pool.leases.state(lease.id)
            try:
                getattr(self.pool, event)(*(lease.id, lease.generation) if event == "filled" else (lease.id,))
            except TransferError:
                assert self.pool.leases.state(lease.id) is before

    @rule(group=leases)
    def enter(self, group: tuple[Lease, ...]) -> None:
        for lease in group:
            try:
                if self.pool.enter(lease.id, lease.generation, "w"):
                    self.inside.append(lease)
            except TransferError:
                pass

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        lease = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        self.pool.leave(lease.id, "w")

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(group=consumes(leases))
    def end(self, group: tuple[Lease, ...]) -> None:
        for lease in group:
            if self.pool.leases.state(lease.id) is SlotState.IN_FLIGHT:
                self.pool.let_go(lease.id)
            if self.pool.leases.state(lease.id) not in (SlotState.FREE, SlotState.QUARANTINED):
                self.pool.release(lease.id)
            for known in [known for known in self.inside if known.id == lease.id]:
                self.inside.remove(known)
                self.pool.leave(lease.id, "w")

    @invariant()
    def nothing_is_shared_or_lost(self) -> None:
        self.pool.check()
        self.ranges.check()

    def teardown(self) -> None:
        for lease in self.pool.leases.live():
            self.end((lease,))
        assert self.ranges.free == self.ranges.total


TestPoolWalk = PoolWalk.TestCase
TestPoolWalk.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
