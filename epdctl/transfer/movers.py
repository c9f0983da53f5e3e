"""What a way to move bytes offers to those who write by it: pools of peers that can be reached, and bytes put there."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from epdctl.wire.transfer import PoolLocation

__all__ = ["DeviceOrder", "Moved", "Mover", "Put", "Remote"]


@dataclass(frozen=True, slots=True)
class Put:
    """``data``: 1-D uint8; ``place``: bytes from the start of the peer's pool."""

    data: torch.Tensor
    place: int


class Remote(Protocol):
    """One pool of one peer, as its writer sees it."""

    def put(self, puts: Sequence[Put], stop: threading.Event) -> None:
        """Write them all and return when they are there; or return early when ``stop`` is set. On a thread.

        Raises TransferError or PeerGone; then bytes may still be on their way, and nobody knows for how long.
        """
        ...

    def view(self, place: int, nbytes: int) -> torch.Tensor | None:
        """The bytes themselves, where they can be had."""
        ...

    def close(self) -> None: ...


class Mover(Protocol):
    """One way to write into the memory of another process.

    ``settle_seconds``: see Guests. ``inline_bytes``: so few are written on the loop, where a thread would cost more.
    """

    backend: str
    note: str
    settle_seconds: float
    inline_bytes: int

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor: ...

    def locate(self, pool: str, memory: torch.Tensor) -> PoolLocation:
        """Make it writable by peers. Raises RegistrationFailed."""
        ...

    def reach(self, location: PoolLocation) -> Remote:
        """May take long; on a thread. Raises PeerGone or TransferError."""
        ...

    def made(self) -> object | None:
        """See Transport: what ``wait`` must be given so that the data is really there."""
        ...

    def wait(self, made: object | None) -> None:
        """On a thread, before the data is read."""
        ...

    def close(self) -> None: ...


class DeviceOrder:
    """The part of a Mover that waits for what a GPU is still making."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def made(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a whole chunk is too long to spin
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, made: object | None) -> None:
        if isinstance(made, torch.cuda.Event):
            made.synchronize()


class Moved:
    """How many bytes were moved, in how many seconds of moving alone. From the threads of several peers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.nbytes = 0
        self.seconds = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        with self._lock:
            self.nbytes += nbytes
            self.seconds += seconds
