"""Who may write where, and until when: the table of leases of one pool. Pure; time and numbers are injected.

A slot's life: FREE → LEASED → FILLING → READY → (IN_FLIGHT → READY) → FREE. Where a writer may still be at work when
its lease ends, the slot is QUARANTINED until somebody knows that it stopped.
"""

from __future__ import annotations

import enum
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from epdctl.errors import LeaseExpired, StaleGeneration, TransferError
from epdctl.wire.transfer import Extent, PoolAddress, RemoteLease

__all__ = ["OPEN", "TRANSITIONS", "Lease", "LeaseTable", "SlotEvent", "SlotState"]


class SlotState(enum.StrEnum):
    FREE = "free"
    LEASED = "leased"  # granted, nothing landed
    FILLING = "filling"  # some bytes landed
    READY = "ready"  # all bytes landed; may be read
    IN_FLIGHT = "in-flight"  # being read
    QUARANTINED = "quarantined"  # ended, and a writer may still write


class SlotEvent(enum.StrEnum):
    GRANT = "grant"
    WRITE = "write"
    FILL = "fill"
    HOLD = "hold"  # a reader begins
    LET_GO = "let-go"  # the reader is done
    RELEASE = "release"
    FENCE = "fence"  # released before its writer is known to have stopped
    CONFIRM = "confirm"  # the writer has stopped


OPEN = frozenset({SlotState.LEASED, SlotState.FILLING})  # a writer may write

TRANSITIONS: Mapping[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.FREE, SlotEvent.GRANT): SlotState.LEASED,
    (SlotState.LEASED, SlotEvent.WRITE): SlotState.FILLING,
    (SlotState.LEASED, SlotEvent.FILL): SlotState.READY,
    (SlotState.LEASED, SlotEvent.RELEASE): SlotState.FREE,
    (SlotState.LEASED, SlotEvent.FENCE): SlotState.QUARANTINED,
    (SlotState.FILLING, SlotEvent.WRITE): SlotState.FILLING,
    (SlotState.FILLING, SlotEvent.FILL): SlotState.READY,
    (SlotState.FILLING, SlotEvent.RELEASE): SlotState.FREE,
    (SlotState.FILLING, SlotEvent.FENCE): SlotState.QUARANTINED,
    (SlotState.READY, SlotEvent.HOLD): SlotState.IN_FLIGHT,
    (SlotState.READY, SlotEvent.RELEASE): SlotState.FREE,
    (SlotState.IN_FLIGHT, SlotEvent.LET_GO): SlotState.READY,
    (SlotState.QUARANTINED, SlotEvent.CONFIRM): SlotState.FREE,
}


@dataclass(frozen=True, slots=True)
class Lease:
    """A right to write into ``extents``, as the pool's owner knows it.

    ``owner``: the request it was granted to. ``expires_at``: on the table's clock; from then on no byte lands, and to
    release it stays its owner's business. Whoever it was told to, in whichever incarnation, has its generation.
    """

    id: int
    generation: int
    extents: tuple[Extent, ...]
    owner: str
    expires_at: float

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)

    def remote(self, address: PoolAddress) -> RemoteLease:
        """What its holder is told."""
        return RemoteLease(pool=address, lease=self.id, generation=self.generation, extents=list(self.extents))


def _draw() -> int:
    return secrets.randbits(63)


class LeaseTable:
    """Every live lease and its state. An event that its state does not allow raises TransferError, changing nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, draw: Callable[[], int] = _draw) -> None:
        self._clock = clock
        self._draw = draw
        self._numbers = itertools.count(1)
        self._leases: dict[int, Lease] = {}
        self._states: dict[int, SlotState] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, extents: Sequence[Extent], owner: str, *, seconds: float) -> Lease:
        lease = Lease(next(self._numbers), self._draw(), tuple(extents), owner, self._clock() + seconds)
        self._leases[lease.id] = lease
        self._states[lease.id] = TRANSITIONS[SlotState.FREE, SlotEvent.GRANT]
        return lease

    def state(self, lease: int) -> SlotState:
        """FREE for a lease that has ended or never was."""
        return self._states.get(lease, SlotState.FREE)

    def find(self, lease: int, generation: int) -> Lease:
        """Raises StaleGeneration when this is not, or no longer, a lease of this pool."""
        known = self._leases.get(lease)
        if known is None or known.generation != generation or self._states[lease] is SlotState.QUARANTINED:
            raise StaleGeneration(f"lease {lease} has ended")
        return known

    def landing(self, lease: int, generation: int) -> Sequence[Extent]:
        """Where bytes that arrive now may go; nowhere (empty) once the slot is filled: the same item came twice.

        Raises StaleGeneration or LeaseExpired.
        """
        known = self.find(lease, generation)
        if self._states[lease] not in OPEN:
            return ()
        if self._clock() >= known.expires_at:
            raise LeaseExpired(f"lease {lease} of {known.owner} expired")
        self.move(lease, SlotEvent.WRITE)
        return known.extents

    def move(self, lease: int, event: SlotEvent) -> SlotState:
        """Apply ``event``; the record of a lease that became FREE is dropped, so read it before."""
        before = self.state(lease)
        after = TRANSITIONS.get((before, event))
        if after is None or lease not in self._leases:
            raise TransferError(f"lease {lease} is {before}: {event} is not possible")
        self._states[lease] = after
        if after is SlotState.FREE:
            del self._states[lease], self._leases[lease]
        return after

    def live(self, *states: SlotState) -> list[Lease]:
        """Every lease, or those in one of ``states``, oldest first."""
        return [lease for lease in self._leases.values() if not states or self._states[lease.id] in states]

    def check(self) -> None:
        """Raises AssertionError when two live leases share a byte or a record is incomplete."""
        assert self._leases.keys() == self._states.keys(), "a lease without a state"
        assert SlotState.FREE not in self._states.values(), "a free slot is on record"
        extents = sorted((e.offset, e.offset + e.nbytes) for lease in self._leases.values() for e in lease.extents)
        for (_, end), (start, _) in itertools.pairwise(extents):
            assert end <= start, f"two leases share byte {start}"
