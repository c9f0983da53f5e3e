"""Addresses of leased memory, and what the two ends of a transport tell each other.

Where the bytes travel in messages: Write → Landed or Rejected. Where the writer writes by itself: Attach → Attached
once, then Begin → Admitted, the bytes, End → Landed. Nothing but a PoolAddress is known before the token was shown.
"""

from __future__ import annotations

from epdctl.ids import Incarnation, RankName
from epdctl.wire.message import Codec, Message, Part

__all__ = [
    "GUEST_TO_HOST",
    "HOST_TO_GUEST",
    "RECEIVER_TO_WRITER",
    "WRITER_TO_RECEIVER",
    "Admitted",
    "Attach",
    "Attached",
    "Begin",
    "End",
    "Extent",
    "GuestToHost",
    "HostToGuest",
    "Landed",
    "PieceHeader",
    "PoolAddress",
    "PoolLocation",
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
    checksum: int | None = None  # CRC-32 of the bytes, where the plan asks for it


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
    write: int  # 0: the writer itself is not let in
    kind: (
        str  # "stale", "expired", "busy", "bounds", "frames", "checksum", "token", "stranger", "full", "gone", "failed"
    )
    text: str


class Attach(Message, frozen=True):
    """The first words of a one-sided writer: who it is, and that it belongs to the cluster."""

    token: str
    rank: RankName
    incarnation: Incarnation
    pid: int  # its death is what ends a write that nobody ended
    born: int  # when it began, in the kernel's ticks: its number may be another's by now


class PoolLocation(Part, frozen=True):
    """Where the bytes of a pool are, in the transport's own terms."""

    pool: str
    place: str  # shm: a file of /proc; cuda-ipc: a handle of CUDA's; mooncake: the engine's host:port
    base: int  # mooncake: the pool's address in its owner's process; else bytes before it in what `place` opens
    nbytes: int


class Attached(Message, frozen=True):
    session: int  # drawn by each process that receives; what was attached to another one is not let in
    pools: list[PoolLocation]


class Begin(Message, frozen=True):
    """May I write into this lease? Nothing is written before Admitted, and End follows in any case."""

    write: int
    session: int
    pool: str
    lease: int
    generation: int


class Admitted(Message, frozen=True):
    write: int
    extents: list[Extent]


class End(Message, frozen=True):
    """The writer has stopped. ``landed``: all bytes are there; ``pieces`` say their checksums, if they have any.

    ``stopped`` false: it gave up, and what moves its bytes may go on: only the end of its process is their end.
    """

    write: int
    landed: bool
    stopped: bool = True
    pieces: list[PieceHeader] = []


WriterToReceiver = Write
ReceiverToWriter = Landed | Rejected

WRITER_TO_RECEIVER: Codec[WriterToReceiver] = Codec(WriterToReceiver)
RECEIVER_TO_WRITER: Codec[ReceiverToWriter] = Codec(ReceiverToWriter)

GuestToHost = Attach | Begin | End
HostToGuest = Attached | Admitted | Landed | Rejected

GUEST_TO_HOST: Codec[GuestToHost] = Codec(GuestToHost)
HOST_TO_GUEST: Codec[HostToGuest] = Codec(HostToGuest)
