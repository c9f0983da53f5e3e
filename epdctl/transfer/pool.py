"""Memory that peers write to, leased slot by slot. Owned by one event loop; moves no bytes itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from epdctl.errors import PoolExhausted, QuarantineFull, SlotBusy, TransferError
from epdctl.transfer.allocators import Allocator
from epdctl.transfer.leases import OPEN, Lease, LeaseTable, SlotEvent, SlotState
from epdctl.transfer.tensors import view_as
from epdctl.wire.transfer import Extent, TensorSpec

__all__ = ["GRACE_SECONDS", "QUARANTINE_PART", "Pool"]

QUARANTINE_PART = 4  # more than one part in so many waiting for lost writers, and the pool's owner must start anew
# Before a slot counts: who lives says until then that it stopped, and what a dead one sent has settled.
GRACE_SECONDS = 30.0


def _nobody_waits() -> None:
    """Memory that comes back is of interest to nobody."""


class Pool:
    """A LandingPool. ``memory``: 1-D uint8 on any device; it is zeroed here, so that no page is faulted in later.

    A writer that writes by itself is let in by ``enter`` and out by ``leave``. A lease that ends while one is inside
    leaves its slot quarantined until the last one has left; any other slot is free at once, since a transport that
    lands bytes in this process refuses a stale generation at the door. ``freed`` is called when a quarantine ends.
    """

    def __init__(
        self,
        name: str,
        memory: torch.Tensor,
        allocator: Allocator,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if memory.dtype is not torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise TransferError(f"pool {name} needs contiguous 1-D uint8 memory")
        self.name = name
        self.memory = memory.zero_()
        if memory.is_cuda:  # a peer's writes are in no order with what this process has queued
            torch.cuda.synchronize(memory.device)
        self.allocator = allocator
        self.freed: Callable[[], None] = _nobody_waits
        self.leases = LeaseTable(clock)
        self._clock = clock
        self._writers: dict[int, list[str]] = {}  # lease → who is inside, once per write
        self._since: dict[int, float] = {}  # quarantined lease → when that began, or a writer of it was seen to be dead

    def lease(self, amount: int, owner: str, *, seconds: float) -> Lease:
        """A slot of ``amount`` units of the allocator. Raises PoolExhausted."""
        return self.leases.grant(self.allocator.take(amount), owner, seconds=seconds)

    def lease_all(self, amounts: Sequence[int], owner: str, *, seconds: float) -> list[Lease]:
        """One slot per amount, or none at all. Raises PoolExhausted."""
        taken: list[Sequence[Extent]] = []
        try:
            taken.extend(self.allocator.take(amount) for amount in amounts)
        except PoolExhausted:
            for extents in taken:
                self.allocator.give(extents)
            raise
        return [self.leases.grant(extents, owner, seconds=seconds) for extents in taken]

    def landing(self, lease: int, generation: int) -> Sequence[Extent]:
        return self.leases.landing(lease, generation)

    def enter(self, lease: int, generation: int, writer: str) -> Sequence[Extent]:
        """See LandingPool. A writer may be inside several times; two writers never are."""
        self.leases.find(lease, generation)
        inside = self._writers.get(lease, [])
        if any(other != writer for other in inside):
            raise SlotBusy(f"{inside[0]} has not stopped writing into lease {lease}")
        extents = self.landing(lease, generation)
        if extents:
            self._writers.setdefault(lease, []).append(writer)
        return extents

    def leave(self, lease: int, writer: str) -> None:
        inside = self._writers[lease]
        inside.remove(writer)
        if inside:
            return
        del self._writers[lease]
        if self.leases.state(lease) is SlotState.QUARANTINED:
            self._end(lease, SlotEvent.CONFIRM)
            self.freed()

    def dying(self, lease: int) -> None:
        """See LandingPool."""
        if lease in self._since:
            self._since[lease] = self._clock()

    def filled(self, lease: int, generation: int) -> Lease:
        """Every byte has landed: the slot may be read, and late writers are turned away. Fine to say twice.

        Raises StaleGeneration, and SlotBusy while a writer is inside.
        """
        known = self.leases.find(lease, generation)
        if inside := self._writers.get(lease):
            raise SlotBusy(f"lease {lease} is said to be filled, and {inside[0]} is still writing")
        if self.leases.state(lease) in OPEN:
            self.leases.move(lease, SlotEvent.FILL)
        return known

    def tensor(self, lease: Lease, spec: TensorSpec) -> torch.Tensor:
        """A view of the slot's first extent as ``spec`` says. Raises TransferError when it does not fit."""
        extent = lease.extents[0]
        return view_as(self.memory[extent.offset : extent.offset + extent.nbytes], spec)

    def hold(self, lease: int) -> None:
        """A reader begins: until ``let_go`` the slot cannot be released."""
        self.leases.move(lease, SlotEvent.HOLD)

    def let_go(self, lease: int) -> None:
        self.leases.move(lease, SlotEvent.LET_GO)

    def release(self, lease: int) -> None:
        """End the lease. Its slot is free, or quarantined while a writer is inside.

        Raises TransferError for a lease that is not live or is being read.
        """
        self._end(lease, SlotEvent.FENCE if lease in self._writers else SlotEvent.RELEASE)
        if lease in self._writers:
            self._since[lease] = self._clock()

    def _end(self, lease: int, event: SlotEvent) -> None:
        extents = next((known.extents for known in self.leases.live() if known.id == lease), ())
        if self.leases.move(lease, event) is SlotState.FREE:
            self._since.pop(lease, None)
            self.allocator.give(extents)

    def bound_quarantine(self) -> None:
        """Raises QuarantineFull when too much of the pool has waited too long for writers that were lost."""
        ripe = self._clock() - GRACE_SECONDS
        overdue = [lease for lease in self.leases.live(SlotState.QUARANTINED) if self._since[lease.id] <= ripe]
        waiting = sum(lease.nbytes for lease in overdue)
        if waiting * QUARANTINE_PART > self.memory.numel():
            lost = sorted({writer for lease in overdue for writer in self._writers[lease.id]})
            raise QuarantineFull(
                f"{waiting} of {self.memory.numel()} bytes of the {self.name} pool are quarantined for more than "
                f"{GRACE_SECONDS:.0f} s: {', '.join(lost)} began to write there and was not seen to stop"
            )

    @property
    def quarantined_bytes(self) -> int:
        return sum(lease.nbytes for lease in self.leases.live(SlotState.QUARANTINED))

    def check(self) -> None:
        """Raises AssertionError when two leases share a byte, one lies outside the memory, or bytes are nobody's."""
        self.leases.check()
        held = sum(self.allocator.held(lease.extents) for lease in self.leases.live())
        assert held + self.allocator.free == self.allocator.total, "what is neither free nor leased was lost"
        assert all(self.leases.state(lease) is not SlotState.FREE for lease in self._writers), "a writer in a free slot"
        fenced = {lease.id for lease in self.leases.live(SlotState.QUARANTINED)}
        assert self._since.keys() == fenced <= self._writers.keys(), "a quarantine without a beginning or a reason"
        for lease in self.leases.live():
            for extent in lease.extents:
                assert 0 <= extent.offset <= extent.offset + extent.nbytes <= self.memory.numel(), "outside the pool"
