"""One process's own memory, behind the interface by which another process's GPU is reached."""

from __future__ import annotations

import ctypes
import secrets
import threading
from collections.abc import Sequence

from epdctl.errors import PeerGone, TransferError, UserError
from epdctl.transfer.cuda import Copies, Shared
from epdctl.transfer.runs import Run

__all__ = ["HostMemory"]

GUARD_SECONDS = 30.0  # against hanging
BEFORE = 64  # what lies in an allocation before the address that is shared, as allocators leave it


class _Later:
    """A Copies: nothing is moved before ``finish``."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._begun: list[Run] = []

    def begin(self, runs: Sequence[Run]) -> None:
        self._memory.batches.append(len(runs))
        self._begun += runs

    def finish(self) -> None:
        if self._memory.broken:
            raise TransferError("this memory does not copy")
        for run in self._begun:
            ctypes.memmove(run.target, run.source, run.nbytes)
        self._begun.clear()


class HostMemory:
    """A Cuda. ``opened``: addresses that are open, once for each opening; ``openings``: how many there ever were.

    ``hidden``: the error that who opens anything gets; ``refused``: somebody did.
    """

    def __init__(self) -> None:
        self.shared: dict[bytes, int] = {}
        self.opened: list[int] = []
        self.openings = 0
        self.hidden: Exception | None = None
        self.refused = threading.Event()
        self.left = 0
        self._changed = threading.Condition()
        self.batches: list[int] = []
        self.broken = False
        self.private = False

    def share(self, address: int) -> Shared:
        if self.private:
            raise UserError("this memory is nobody else's")
        handle = secrets.token_bytes(64)
        self.shared[handle] = address - BEFORE
        return Shared(handle, BEFORE)

    def open(self, handle: bytes) -> int:
        if self.hidden is not None:
            self.refused.set()
            raise self.hidden
        if handle not in self.shared:
            raise PeerGone("nobody shares this")
        with self._changed:
            self.openings += 1
            self.opened.append(self.shared[handle])
        return self.shared[handle]

    def close(self, address: int) -> None:
        with self._changed:
            self.opened.remove(address)
            self._changed.notify_all()

    def all_closed(self) -> bool:
        """Waits for it: a peer's memory is closed on the thread that wrote there."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.opened, GUARD_SECONDS)

    def free(self) -> int:
        return self.left

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def copies(self) -> Copies:
        return _Later(self)
