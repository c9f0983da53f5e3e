"""Addresses of leased memory, and the messages of the ZMQ transport."""

from __future__ import annotations

from epdctl.ids import Incarnation, RankName
from epdctl.wire.message import Codec, Message, Part

__all__ = [
    "RECEIVER_TO_WRITER",
    "WRITER_TO_RECEIVER",
    "Extent",
    "Landed",
    "PieceHeader",
    "PoolAddress",
    "ReceiverToWriter",
    "Rejected",
    "RemoteLease",
    "TensorSpec",
    "Write",
    "WriterToReceiver",
]


class TensorSpec(Part, frozen=True):
    """The shape of the bytes in a slot."""

    dtype: str  # torch's name: "float32", "bfloat16"
    shape: list[int]
    nbytes: int
    checksum: int | None = None


class PoolAddress(Part, frozen=True):
    """Memory of one rank that peers may write to, once they hold a lease on a part of it."""

    owner: RankName
    incarnation: Incarnation
    pool: str  # "embeddings" or "kv"
    backend: str
    endpoint: str


class Extent(Part, frozen=True):
    offset: int  # bytes from the pool's start
    nbytes: int


class RemoteLease(Part, frozen=True):
    """The right to write into some extents of a pool, as its holder knows it.

    ``generation`` is drawn anew for every lease; the receiver refuses bytes that carry another.
    """

    pool: PoolAddress
    lease: int
    generation: int
    extents: list[Extent]


class PieceHeader(Part, frozen=True):
    """One payload frame: it goes to ``extents[extent]``, ``offset`` bytes in."""

    extent: int
    offset: int
    nbytes: int


class Write(Message, frozen=True):
    """Followed by one payload frame per piece."""

    write: int  # the writer's own number, echoed
    pool: str
    lease: int
    generation: int
    pieces: list[PieceHeader]
    token: str = ""


class Landed(Message, frozen=True):
    write: int


class Rejected(Message, frozen=True):
    write: int
    kind: str  # "stale", "expired", "bounds", "frames"
    text: str


WriterToReceiver = Write
ReceiverToWriter = Landed | Rejected

WRITER_TO_RECEIVER: Codec[WriterToReceiver] = Codec(WriterToReceiver)
RECEIVER_TO_WRITER: Codec[ReceiverToWriter] = Codec(ReceiverToWriter)
