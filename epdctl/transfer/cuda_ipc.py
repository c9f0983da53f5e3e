"""Bytes between the GPUs of one host: the receiver's pool is memory that its writers' processes open and copy into.

Each process needs to see its own GPU only. Copies run on a stream of their own, so they wait for the data that they
move and for nothing that was queued behind it. Memory stays as long as somebody has it open: who withdraws from a
dead peer closes it, and only then is it free for the peer's successor.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from epdctl.errors import PeerGone, RegistrationFailed, TransferError, UserError
from epdctl.transfer.allocators import ALIGNMENT
from epdctl.transfer.cuda import Copies, Cuda, open_cuda
from epdctl.transfer.landing import Owner
from epdctl.transfer.movers import DeviceOrder, Put
from epdctl.transfer.onesided import OneSidedTransport
from epdctl.transfer.runs import Run, runs
from epdctl.transfer.tensors import require_room
from epdctl.wire.transfer import PoolLocation

__all__ = ["CudaIpcMover", "cuda_ipc_transport"]

log = logging.getLogger(__name__)

HEADER_BYTES = ALIGNMENT  # before each pool; the mark is in its first bytes
MARK_BYTES = 16
BATCH_RUNS = 64  # of one call: the next are put together while these are copied
PROBE_BYTES = 64 << 20
MEMORY_SECONDS = 45.0  # for a pool's to come free: by default what hangs and has it open is killed before
PAUSE_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Region:
    """A pool's memory. ``place``: how a peer opens it; ``base``: bytes before the pool in what it opens."""

    place: str
    base: int
    memory: torch.Tensor


class _Opened:
    """A Remote. ``address``: of the peer's pool; ``whole``: of the allocation that it lies in."""

    def __init__(self, cuda: Cuda, whole: int, address: int) -> None:
        self._cuda = cuda
        self._whole = whole
        self._address = address
        self._copies = cuda.copies()

    def put(self, puts: Sequence[Put], stop: threading.Event) -> None:
        if stop.is_set():
            return
        for batch in _batched(runs(puts, self._address), BATCH_RUNS):
            self._copies.begin(batch)
        self._copies.finish()

    def view(self, place: int, nbytes: int) -> None:
        return None

    def close(self) -> None:
        self._cuda.close(self._whole)


class CudaIpcMover(DeviceOrder):
    """A Mover. Its writers stop with their processes: the driver ends a dead one's copies before it is seen to be dead;
    ``settle_seconds`` is on top of that."""

    backend = "cuda-ipc"
    settle_seconds = 1.0
    inline_bytes = 0

    def __init__(self, cuda: Cuda, device: torch.device) -> None:
        super().__init__(device)
        self._cuda = cuda
        self._regions: dict[int, _Region] = {}
        self.note = f"cuda-ipc, {_probe(cuda, device):.1f} GB/s to itself"

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        if device != self._device:
            raise RegistrationFailed(f"cuda-ipc moves memory of {self._device}, not of {device}")
        require_room(nbytes, device)
        whole = self._taken(HEADER_BYTES + nbytes)
        mark = secrets.token_bytes(MARK_BYTES)
        whole[:MARK_BYTES].copy_(torch.frombuffer(bytearray(mark), dtype=torch.uint8))
        shared = self._cuda.share(whole.data_ptr())
        memory = whole[HEADER_BYTES:]
        place = f"{shared.handle.hex()}#{mark.hex()}"
        self._regions[memory.data_ptr()] = _Region(place, shared.before + HEADER_BYTES, memory)
        return memory

    def _taken(self, nbytes: int) -> torch.Tensor:
        """Memory that a dead predecessor had is free when its writers have closed it, and they may be late to hear of
        its end. Raises torch.OutOfMemoryError.
        """
        ends, told = time.monotonic() + MEMORY_SECONDS, False
        while True:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:
                if self._cuda.free() >= nbytes or time.monotonic() >= ends:  # the first: it is this rank's own share
                    raise
                if not told:
                    log.warning("others have so much of %s that %d MiB are not left yet", self._device, nbytes >> 20)
                told = True
                time.sleep(PAUSE_SECONDS)

    def locate(self, pool: str, memory: torch.Tensor) -> PoolLocation:
        region = self._regions.get(memory.data_ptr())
        if region is None or region.memory.numel() != memory.numel():
            raise RegistrationFailed(f"the memory of the {pool} pool was not allocated by this transport")
        return PoolLocation(pool=pool, place=region.place, base=region.base, nbytes=memory.numel())

    def reach(self, location: PoolLocation) -> _Opened:
        handle, mark = _parsed(location)
        whole = self._cuda.open(handle)
        try:
            found = self._cuda.read(whole + location.base - HEADER_BYTES, MARK_BYTES)
            if found != mark:
                raise PeerGone(f"what was opened is not the memory of the {location.pool} pool")
        except BaseException:
            self._cuda.close(whole)
            raise
        return _Opened(self._cuda, whole, whole + location.base)

    def close(self) -> None:
        self._regions.clear()


def _parsed(location: PoolLocation) -> tuple[bytes, bytes]:
    handle, _, mark = location.place.partition("#")
    try:
        return bytes.fromhex(handle), bytes.fromhex(mark)
    except ValueError as error:
        raise TransferError(f"the place of the {location.pool} pool is not one of cuda-ipc's") from error


def _batched(every: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(every)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _probe(cuda: Cuda, device: torch.device) -> float:
    """GB/s of pieces in no order within the GPU, by the calls that write to peers. Raises UserError when they do not
    arrive, or the GPU's memory cannot be shared.
    """
    source = torch.arange(PROBE_BYTES // 8, dtype=torch.int64, device=device).view(torch.uint8)
    target = torch.zeros_like(source)
    piece = PROBE_BYTES // BATCH_RUNS
    order = range(0, PROBE_BYTES, piece)
    swapped = [
        Run(source.data_ptr() + start, target.data_ptr() + place, piece)
        for start, place in zip(order, reversed(order), strict=True)
    ]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cuda.share(target.data_ptr())  # a rank that owns no pool must be told too
    copies = cuda.copies()
    rate = PROBE_BYTES / min(_timed(copies, swapped) for _ in range(3)) / 1e9
    if not torch.equal(source.view(-1, piece).flip(0), target.view(-1, piece)):
        raise UserError(f"{device} said that it had copied what it had not", hint="write transfer.backend: zmq")
    return rate


def _timed(copies: Copies, these: Sequence[Run]) -> float:
    began = time.perf_counter()
    copies.begin(these)
    copies.finish()
    return time.perf_counter() - began


def cuda_ipc_transport(endpoint: str, owner: Owner, device: torch.device) -> OneSidedTransport:
    """Raises UserError where this GPU's memory cannot be moved so."""
    return OneSidedTransport(endpoint, owner, CudaIpcMover(open_cuda(device), device))
