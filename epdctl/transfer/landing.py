"""What both ends of a transport with messages agree on: how pieces are cut, and how they are checked and landed."""

from __future__ import annotations

import hmac
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch

from epdctl.errors import LeaseExpired, RegistrationFailed, SlotBusy, StaleGeneration, TransferError
from epdctl.ids import Incarnation, RankName
from epdctl.transfer.base import LandingPool, Piece
from epdctl.wire.sockets import Buffer
from epdctl.wire.transfer import Extent, Landed, PieceHeader, PoolAddress, ReceiverToWriter, Rejected, Write

__all__ = [
    "MAX_PAYLOAD_BYTES",
    "Frame",
    "Landings",
    "Owner",
    "Parcel",
    "Refusal",
    "cut",
    "kind_of",
    "payload",
    "place_of",
    "refused",
    "same_token",
    "sums_of",
    "verify",
]

MAX_PAYLOAD_BYTES = 16 << 20  # of one message: what the receiving loop copies in one turn (about 3 ms)
Frame = Buffer | torch.Tensor  # the second within one process: 1-D uint8, on a GPU

PARCEL_BYTES = 4 << 20  # of one message as we cut them: fewer answers than 1 MiB needs, more overlap than 16 MiB has
MAX_PIECES = 256  # of one message


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose memory it is, and the cluster's secret that its writers present.

    ``checksum``: what it writes carries a CRC-32 for the receiver to verify; about 1 s for each GB, at both ends.
    """

    rank: RankName
    incarnation: Incarnation
    token: str
    checksum: bool = False


@dataclass(frozen=True, slots=True)
class Parcel:
    """The pieces of one message."""

    pieces: Sequence[Piece]

    def headers(self, *, checksum: bool = False) -> list[PieceHeader]:
        sums = sums_of(self.pieces) if checksum else [None] * len(self.pieces)
        return [
            PieceHeader(extent=p.extent, offset=p.offset, nbytes=p.data.numel(), checksum=one)
            for p, one in zip(self.pieces, sums, strict=True)
        ]


def sums_of(pieces: Sequence[Piece]) -> list[int]:
    """The CRC-32 of each piece."""
    return [zlib.crc32(payload(piece.data)) for piece in pieces]


def _slices(piece: Piece) -> Iterator[Piece]:
    for start in range(0, piece.data.numel(), PARCEL_BYTES):
        yield Piece(piece.data[start : start + PARCEL_BYTES], piece.extent, piece.offset + start)


def cut(pieces: Sequence[Piece]) -> Iterator[Parcel]:
    """Parcels of at most PARCEL_BYTES and MAX_PIECES, in order."""
    batch: list[Piece] = []
    size = 0
    for piece in itertools.chain.from_iterable(map(_slices, pieces)):
        if batch and (size + piece.data.numel() > PARCEL_BYTES or len(batch) == MAX_PIECES):
            yield Parcel(batch)
            batch, size = [], 0
        batch.append(piece)
        size += piece.data.numel()
    if batch:
        yield Parcel(batch)


def payload(data: torch.Tensor) -> memoryview:
    """The bytes of 1-D uint8 ``data``: a view on the CPU, a copy through pinned memory from a GPU (this waits)."""
    if data.is_cuda:
        staged = torch.empty(data.numel(), dtype=torch.uint8, pin_memory=True)
        data = staged.copy_(data)
    return data.numpy().data


class Refusal(TransferError):
    """Something is wrong with what a writer said. ``kind``: what it is told."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


ERRORS: Mapping[str, type[TransferError]] = {"stale": StaleGeneration, "expired": LeaseExpired, "busy": SlotBusy}


def refused(answer: Rejected) -> TransferError:
    """The writer's error for what the receiver said."""
    return ERRORS.get(answer.kind, TransferError)(f"the receiver refused the bytes: {answer.text}")


def kind_of(error: TransferError) -> str:
    """The word by which a writer is told of ``error``."""
    if isinstance(error, Refusal):
        return error.kind
    return next((kind for kind, known in ERRORS.items() if isinstance(error, known)), "failed")


def same_token(theirs: str, ours: str) -> bool:
    return hmac.compare_digest(theirs.encode(), ours.encode())


class Landings:
    """The receiving half: the pools of one rank, and the one way into them."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self._pools: dict[str, LandingPool] = {}
        self._copiers: dict[str, Callable[[int, Frame], None]] = {}

    def register(self, pool: LandingPool, backend: str, endpoint: str) -> PoolAddress:
        """Raises RegistrationFailed when a pool of this name is there."""
        if pool.name in self._pools:
            raise RegistrationFailed(f"a pool called {pool.name} is registered already")
        self._pools[pool.name] = pool
        self._copiers[pool.name] = _copier(pool.memory)
        rank, incarnation = self.owner.rank, self.owner.incarnation
        return PoolAddress(owner=rank, incarnation=incarnation, pool=pool.name, backend=backend, endpoint=endpoint)

    def land(self, write: Write, frames: Sequence[Frame]) -> ReceiverToWriter:
        """Copy the frames to where the lease allows, all of them or none, and say so."""
        try:
            self._check_frames(write, frames)
            self._copy(write, frames)
        except TransferError as error:
            return Rejected(write=write.write, kind=kind_of(error), text=error.message)
        return Landed(write=write.write)

    def _check_frames(self, write: Write, frames: Sequence[Frame]) -> None:
        if not same_token(write.token, self.owner.token):
            raise Refusal("token", "the writer belongs to another cluster")
        if len(frames) != len(write.pieces):
            raise Refusal("frames", f"{len(frames)} frames for {len(write.pieces)} pieces")
        for header, frame in zip(write.pieces, frames, strict=True):
            if len(frame) != header.nbytes or header.nbytes > MAX_PAYLOAD_BYTES:
                raise Refusal("frames", f"a frame of {len(frame)} bytes for a piece of {header.nbytes}")
            verify(header, frame)

    def _copy(self, write: Write, frames: Sequence[Frame]) -> None:
        pool = self._pools.get(write.pool)
        if pool is None:
            raise StaleGeneration(f"no pool is called {write.pool!r}")
        extents = pool.landing(write.lease, write.generation)
        if not extents:
            return
        places = [place_of(header, extents) for header in write.pieces]
        for place, frame in zip(places, frames, strict=True):
            self._copiers[write.pool](place, frame)


def verify(header: PieceHeader, data: Frame) -> None:
    """Raises Refusal when a checksum was sent and the bytes have another."""
    if header.checksum is not None and (found := zlib.crc32(_on_host(data))) != header.checksum:
        raise Refusal(
            "checksum", f"{header.nbytes} bytes have the checksum {found:08x}, sent was {header.checksum:08x}"
        )


def place_of(piece: PieceHeader | Piece, extents: Sequence[Extent]) -> int:
    """Where in the pool this piece begins. Raises Refusal when it leaves its extent."""
    if not 0 <= piece.extent < len(extents):
        raise Refusal("bounds", f"extent {piece.extent} of {len(extents)}")
    extent, end = extents[piece.extent], piece.offset + piece.nbytes
    if min(piece.offset, piece.nbytes) < 0 or end > extent.nbytes:
        raise Refusal("bounds", f"bytes {piece.offset} to {end} of an extent of {extent.nbytes}")
    return extent.offset + piece.offset


def _on_host(frame: Frame) -> Buffer:
    return payload(frame) if isinstance(frame, torch.Tensor) else frame


def _copier(memory: torch.Tensor) -> Callable[[int, Frame], None]:
    """Copies a frame into ``memory`` at an offset; from a host into a GPU's through one pinned buffer.

    From GPU to GPU nobody waits: whoever reads the pool does so on the device's default stream, behind the copy.
    """
    target = None if memory.is_cuda else memory.numpy()
    staged = torch.empty(MAX_PAYLOAD_BYTES, dtype=torch.uint8, pin_memory=True) if memory.is_cuda else None

    def to_cpu(place: int, frame: Frame) -> None:
        assert target is not None
        target[place : place + len(frame)] = numpy.frombuffer(_on_host(frame), dtype=numpy.uint8)

    def to_gpu(place: int, frame: Frame) -> None:
        assert staged is not None
        there = memory[place : place + len(frame)]
        if isinstance(frame, torch.Tensor):
            there.copy_(frame)
        else:
            staged.numpy()[: len(frame)] = numpy.frombuffer(frame, dtype=numpy.uint8)
            there.copy_(staged[: len(frame)])

    return to_cpu if staged is None else to_gpu
