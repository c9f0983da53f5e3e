"""Bytes within one host: the receiver's pool is shared memory without a name, and its writers map it.

The memory lives as long as somebody has it open, so nothing is left when every process was killed. Whoever has the
owner's user id can open it by way of /proc; random bytes in its first page tell a writer that it is the right one.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from epdctl.errors import PeerGone, RegistrationFailed, TransferError
from epdctl.transfer.landing import Owner
from epdctl.transfer.movers import Put
from epdctl.transfer.onesided import OneSidedTransport
from epdctl.transfer.tensors import require_room
from epdctl.wire.transfer import PoolLocation

__all__ = ["ShmMover", "shm_transport"]

HEADER_BYTES = 4096  # one page before the pool
MARK_BYTES = 16
STRIDE_BYTES = 64 << 20  # between two looks at whether the writer was told to stop: about 6 ms
WIDE_BYTES = 4 << 20  # from here on several threads copy: one alone leaves the memory half idle
COPIERS = 4
F_ADD_SEALS, F_SEAL_SHRINK, F_SEAL_GROW = 1033, 0x2, 0x4  # linux/fcntl.h: nobody may make us fault by cutting it


@dataclass(frozen=True, slots=True)
class _Region:
    """A pool's memory. ``mark``: random bytes at its start."""

    fd: int
    mark: bytes
    memory: torch.Tensor


def _map(fd: int, nbytes: int) -> torch.Tensor:
    """All of it: 1-D uint8. The mapping ends with the last tensor that looks into it.

    Its pages are faulted in by whoever touches them first, which must be a tensor's doing: MAP_POPULATE would hold
    the GIL for seconds, and with it the loop that says that this rank lives.
    """
    return torch.frombuffer(mmap.mmap(fd, nbytes, mmap.MAP_SHARED), dtype=torch.uint8)


def _touched(memory: torch.Tensor) -> torch.Tensor:
    memory[:: mmap.PAGESIZE].sum()
    return memory


def _make(nbytes: int) -> _Region:
    """Raises RegistrationFailed when there is not so much memory."""
    fd = os.memfd_create("epdctl-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, HEADER_BYTES + nbytes)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
        mark = secrets.token_bytes(MARK_BYTES)
        os.pwrite(fd, mark, 0)
        return _Region(fd, mark, _map(fd, HEADER_BYTES + nbytes)[HEADER_BYTES:])
    except OSError as error:
        os.close(fd)
        raise RegistrationFailed(f"no shared memory for a pool of {nbytes / 2**20:.0f} MiB: {error}") from error


class _Copier:
    """Copies within memory, with as many threads as that has use for and this process has cores."""

    def __init__(self) -> None:
        self._threads = min(COPIERS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._threads, "shm-copy")

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Both 1-D uint8 of one length. Back when every byte is there."""
        parts = self._threads if source.numel() >= WIDE_BYTES else 1
        first, *others = zip(target.chunk(parts), source.chunk(parts), strict=True)
        rest = [self._pool.submit(into.copy_, out) for into, out in others]
        first[0].copy_(first[1])
        for copied in rest:
            copied.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False)


class _Mapping:
    """A Remote."""

    def __init__(self, memory: torch.Tensor, copier: _Copier) -> None:
        self._memory: torch.Tensor | None = memory
        self._copier = copier

    def put(self, puts: Sequence[Put], stop: threading.Event) -> None:
        for put in puts:
            target = self.view(put.place, put.data.numel())
            if target is None:
                raise PeerGone("the peer's memory was closed")
            for start in range(0, put.data.numel(), STRIDE_BYTES):
                if stop.is_set():
                    return
                self._copier.copy(target[start : start + STRIDE_BYTES], put.data[start : start + STRIDE_BYTES])

    def view(self, place: int, nbytes: int) -> torch.Tensor | None:
        return None if self._memory is None else self._memory[place : place + nbytes]

    def close(self) -> None:
        self._memory = None


class ShmMover:
    """A Mover. Its writers stop with their processes: a dead one's mapping is closed by the kernel."""

    backend = "shm"
    note = "shm"
    settle_seconds = 0.0
    inline_bytes = 256 << 10

    def __init__(self) -> None:
        self._regions: dict[int, _Region] = {}
        self._copier = _Copier()

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            raise RegistrationFailed(f"shm moves host memory only, not that of {device}; write transfer.backend: auto")
        require_room(nbytes, device)
        region = _make(nbytes)
        self._regions[region.memory.data_ptr()] = region
        return region.memory

    def locate(self, pool: str, memory: torch.Tensor) -> PoolLocation:
        region = self._regions.get(memory.data_ptr())
        if region is None or region.memory.numel() != memory.numel():
            raise RegistrationFailed(f"the memory of the {pool} pool was not allocated by this transport")
        place = f"/proc/{os.getpid()}/fd/{region.fd}#{region.mark.hex()}"
        return PoolLocation(pool=pool, place=place, base=HEADER_BYTES, nbytes=memory.numel())

    def reach(self, location: PoolLocation) -> _Mapping:
        path, _, mark = location.place.partition("#")
        total = location.base + location.nbytes
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_size != total or os.pread(fd, MARK_BYTES, 0).hex() != mark:
                    raise PeerGone(f"{path} is not the memory of the {location.pool} pool any more")
                return _Mapping(_touched(_map(fd, total))[location.base :], self._copier)
            finally:
                os.close(fd)
        except PermissionError as error:
            raise TransferError(f"{path} belongs to another user: {error}") from error
        except OSError as error:
            raise PeerGone(f"the memory of the {location.pool} pool cannot be mapped: {error}") from error

    def made(self) -> None:
        return None

    def wait(self, made: object | None) -> None:
        """Host memory is there when its maker says so."""

    def close(self) -> None:
        self._copier.close()
        for region in self._regions.values():
            with contextlib.suppress(OSError):
                os.close(region.fd)
        self._regions.clear()


def shm_transport(endpoint: str, owner: Owner) -> OneSidedTransport:
    return OneSidedTransport(endpoint, owner, ShmMover())
