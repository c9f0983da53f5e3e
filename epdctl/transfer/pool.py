"""Memory that peers write to, leased slot by slot. Owned by one event loop; moves no bytes itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from epdctl.errors import PoolExhausted, TransferError
from epdctl.transfer.allocators import Allocator
from epdctl.transfer.leases import OPEN, Lease, LeaseTable, SlotEvent, SlotState
from epdctl.transfer.tensors import view_as
from epdctl.wire.transfer import Extent, TensorSpec

__all__ = ["Pool"]


class Pool:
    """A LandingPool. ``memory``: 1-D uint8 on any device; it is zeroed here, so that no page is faulted in later.

    ``one_sided``: peers write without this process taking part, so a lease that ends before it is filled leaves its
    slot quarantined until ``confirm``. With a transport that lands bytes in this process, a stale generation is refused
    at the door and the slot is free at once.
    """

    def __init__(
        self,
        name: str,
        memory: torch.Tensor,
        allocator: Allocator,
        *,
        one_sided: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if memory.dtype is not torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise TransferError(f"pool {name} needs contiguous 1-D uint8 memory")
        self.name = name
        self.memory = memory.zero_()
        self.allocator = allocator
        self.one_sided = one_sided
        self.leases = LeaseTable(clock)

    def lease(self, amount: int, owner: str, *, seconds: float, incarnation: int = 0) -> Lease:
        """A slot of ``amount`` units of the allocator. Raises PoolExhausted."""
        return self.leases.grant(self.allocator.take(amount), owner, seconds=seconds, incarnation=incarnation)

    def lease_all(self, amounts: Sequence[int], owner: str, *, seconds: float, incarnation: int = 0) -> list[Lease]:
        """One slot per amount, or none at all. Raises PoolExhausted."""
        taken: list[Sequence[Extent]] = []
        try:
            taken.extend(self.allocator.take(amount) for amount in amounts)
        except PoolExhausted:
            for extents in taken:
                self.allocator.give(extents)
            raise
        return [self.leases.grant(extents, owner, seconds=seconds, incarnation=incarnation) for extents in taken]

    def landing(self, lease: int, generation: int) -> Sequence[Extent]:
        return self.leases.landing(lease, generation)

    def filled(self, lease: int, generation: int) -> Lease:
        """Every byte has landed: the slot may be read, and late writers are turned away. Fine to say twice.

        Raises StaleGeneration.
        """
        known = self.leases.find(lease, generation)
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
        """End the lease. Its slot is free, or quarantined where a one-sided writer may still be at work.

        Raises TransferError for a lease that is not live or is being read.
        """
        unfinished = self.leases.state(lease) in OPEN
        self._end(lease, SlotEvent.FENCE if self.one_sided and unfinished else SlotEvent.RELEASE)

    def confirm(self, lease: int) -> None:
        """The writer of this quarantined slot has stopped, or its mapping is closed."""
        self._end(lease, SlotEvent.CONFIRM)

    def _end(self, lease: int, event: SlotEvent) -> None:
        extents = next((known.extents for known in self.leases.live() if known.id == lease), ())
        if self.leases.move(lease, event) is SlotState.FREE:
            self.allocator.give(extents)

    def expire(self) -> list[Lease]:
        """Release what nobody filled in time; returns those leases."""
        overdue = self.leases.overdue()
        for lease in overdue:
            self.release(lease.id)
        return overdue

    @property
    def quarantined_bytes(self) -> int:
        return sum(lease.nbytes for lease in self.leases.live(SlotState.QUARANTINED))

    def check(self) -> None:
        """Raises AssertionError when two leases share a byte or one lies outside the memory."""
        self.leases.check()
        for lease in self.leases.live():
            for extent in lease.extents:
                assert 0 <= extent.offset <= extent.offset + extent.nbytes <= self.memory.numel(), "outside the pool"
