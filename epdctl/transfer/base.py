"""How bytes get from one rank's memory into a slot that another rank leased: the interface, and its vocabulary.

The receiver owns the memory: it registers a pool, leases parts of it and hands out RemoteLease values. A sender writes
into a lease and nowhere else. When ``write`` returns, the bytes are in the slot, whichever transport moved them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from epdctl.wire.transfer import Extent, PoolAddress, RemoteLease

__all__ = ["LandingPool", "Piece", "Transport"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Contiguous bytes of the sender, and where they go: ``offset`` bytes into ``lease.extents[extent]``.

    ``data``: 1-D uint8 tensor on the sender's device; it must not change until ``write`` has returned.
    """

    data: torch.Tensor
    extent: int
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return self.data.numel()


class LandingPool(Protocol):
    """Memory that peers write to. Implemented by transfer.pool."""

    @property
    def name(self) -> str: ...

    @property
    def memory(self) -> torch.Tensor:
        """All of it: 1-D uint8."""
        ...

    def landing(self, lease: int, generation: int) -> Sequence[Extent]:
        """The extents a writer of this lease may fill. Raises StaleGeneration or LeaseExpired.

        Empty once the slot is filled: an item that was sent twice has landed, and a reader may be at work, so late
        bytes are dropped and count as landed.
        """
        ...

    def enter(self, lease: int, generation: int, writer: str) -> Sequence[Extent]:
        """Like ``landing`` for a writer that writes by itself: until ``leave``, nobody else gets these bytes.

        Raises SlotBusy too, when another writer is at work there.
        """
        ...

    def leave(self, lease: int, writer: str) -> None:
        """This writer of the lease has stopped, and will not write late."""
        ...

    def dying(self, lease: int) -> None:
        """A writer of the lease is dead: ``leave`` follows when what it had sent has settled."""
        ...


class Transport(Protocol):
    """Both ends of one way to move bytes. Used from one event loop."""

    @property
    def endpoint(self) -> str:
        """Where this end listens."""
        ...

    @property
    def note(self) -> str:
        """What it is and, where that was measured at start, how fast: for ``status`` and the log."""
        ...

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Memory for a pool that will be registered: 1-D uint8. Callable from any thread. Raises RegistrationFailed."""
        ...

    def register(self, pool: LandingPool) -> PoolAddress:
        """Make ``pool`` writable by peers; once per pool, before Ready. Raises RegistrationFailed."""
        ...

    async def greet(self, endpoint: str) -> None:
        """A peer that will be written to is there: open its memory, where that can be done ahead of the first write.

        Raises OutOfReach where it cannot be done at all, PeerGone where the peer leaves or something else is in the
        way for long, DeadlineExceeded where it does not answer, and TransferError where it does not let us in.
        """
        ...

    def made(self) -> object | None:
        """Asked on the thread that makes data, right behind its kernels: what ``write`` is to wait for."""
        ...

    async def write(
        self, lease: RemoteLease, pieces: Sequence[Piece], *, seconds: float, made: object | None = None
    ) -> None:
        """Without ``made`` it waits for what the caller's stream has been given by now.

        Raises PeerGone, DeadlineExceeded, StaleGeneration or LeaseExpired; then nothing may be assumed landed.
        """
        ...

    async def open_slot(self, lease: RemoteLease, *, seconds: float) -> torch.Tensor | None:
        """The first extent of the lease, to be written in place: 1-D uint8; None where that cannot be.

        What was opened is ended by ``write`` with pieces of that tensor, or by ``drop_slot``; both once nobody writes
        to it any more. Raises what ``write`` raises.
        """
        ...

    def drop_slot(self, lease: RemoteLease) -> None:
        """Nothing will come of the slot that was opened."""
        ...

    def bound_adrift(self) -> None:
        """Raises WritesAdrift where this process should end, so that the slots of peers that are there come back."""
        ...

    def withdraw(self, endpoint: str) -> None:
        """The peer at ``endpoint`` is gone: fail its pending writes with PeerGone and drop what is queued for it."""
        ...

    async def close(self) -> None: ...
