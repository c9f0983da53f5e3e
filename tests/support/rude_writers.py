"""What a writer may do wrong on the wire, one function per fault; each returns what came of it, in words.

They run in a process of their own, and present the cluster's token: a stranger gets nowhere near a slot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from epdctl.ids import Incarnation, RankName
from epdctl.transfer.deaths import birth
from epdctl.wire.transfer import (
    GUEST_TO_HOST,
    HOST_TO_GUEST,
    RECEIVER_TO_WRITER,
    WRITER_TO_RECEIVER,
    Attach,
    Attached,
    Begin,
    End,
    PieceHeader,
    Rejected,
    RemoteLease,
    Write,
)
from tests.support.raw_wire import RawWire, connected

__all__ = ["FAULTS", "Fault", "of_another_cluster", "without_end"]

TOKEN = "secret"
NBYTES = 1000
MESSAGE_LIMIT = 16 << 20
Fault = Callable[[RemoteLease], str]


def _write(lease: RemoteLease, nbytes: int = NBYTES) -> bytes:
    write = Write(
        write=1,
        pool=lease.pool.pool,
        lease=lease.lease,
        generation=lease.generation,
        pieces=[PieceHeader(extent=0, offset=0, nbytes=nbytes)],
        token=TOKEN,
    )
    return WRITER_TO_RECEIVER.encode(write)


def _attach() -> bytes:
    hello = Attach(
        token=TOKEN, rank=RankName("encoder/7"), incarnation=Incarnation(1), pid=os.getpid(), born=birth(os.getpid())
    )
    return GUEST_TO_HOST.encode(hello)


def _attached(wire: RawWire) -> Attached:
    wire.send(_attach())
    answer = HOST_TO_GUEST.decode(wire.answer())
    assert isinstance(answer, Attached)
    return answer


def _begin(wire: RawWire, lease: RemoteLease) -> str:
    session = _attached(wire).session
    begin = Begin(write=1, session=session, pool=lease.pool.pool, lease=lease.lease, generation=lease.generation)
    wire.send(GUEST_TO_HOST.encode(begin))
    return type(HOST_TO_GUEST.decode(wire.answer())).__name__


def payload_cut_short(lease: RemoteLease) -> str:
    """The connection ends in the middle of the bytes."""
    with connected(lease.pool.endpoint) as wire:
        head = _write(lease)
        wire.announce(len(head), more=True)
        wire.part(head)
        wire.announce(NBYTES)
        wire.part(b"x" * (NBYTES // 2))
    return "left"


def frame_shorter_than_said(lease: RemoteLease) -> str:
    with connected(lease.pool.endpoint) as wire:
        wire.send(_write(lease), b"x" * (NBYTES - 1))
        return _kind(RECEIVER_TO_WRITER.decode(wire.answer()))


def frame_above_a_message(lease: RemoteLease) -> str:
    with connected(lease.pool.endpoint) as wire:
        wire.send(_write(lease, MESSAGE_LIMIT + 1), bytes(MESSAGE_LIMIT + 1))
        return _kind(RECEIVER_TO_WRITER.decode(wire.answer()))


def frame_without_end(lease: RemoteLease) -> str:
    return without_end(lease.pool.endpoint)


def without_end(endpoint: str) -> str:
    """It announces more than any socket takes."""
    with connected(endpoint) as wire:
        wire.announce(1 << 40)
        return "hung up on" if wire.hung_up() else "answered"


def message_cut_short(lease: RemoteLease) -> str:
    """The connection ends in the middle of a message about a write that has begun."""
    with connected(lease.pool.endpoint) as wire:
        admitted = _begin(wire, lease)
        end = GUEST_TO_HOST.encode(End(write=1, landed=True))
        wire.announce(len(end))
        wire.part(end[:-2])
    return admitted


def message_without_its_end(lease: RemoteLease) -> str:
    """Whole as a frame, half as a message: dropped, and the next one on the same connection is heard."""
    with connected(lease.pool.endpoint) as wire:
        wire.send(_attach()[:-5])
        return type(_attached(wire)).__name__


def attached_twice(lease: RemoteLease) -> str:
    """And so, to a careless receiver, somebody else than the one who is inside."""
    with connected(lease.pool.endpoint) as wire:
        _begin(wire, lease)
        return type(_attached(wire)).__name__


def of_another_cluster(endpoint: str, *, one_sided: bool) -> str:
    """It has everything but the token."""
    nobody = RankName("encoder/7")
    write = Write(write=1, pool="embeddings", lease=1, generation=1, pieces=[], token="guess")
    hello = Attach(token="guess", rank=nobody, incarnation=Incarnation(1), pid=os.getpid(), born=birth(os.getpid()))
    with connected(endpoint) as wire:
        wire.send(GUEST_TO_HOST.encode(hello) if one_sided else WRITER_TO_RECEIVER.encode(write))
        answer = wire.answer()
    return _kind(HOST_TO_GUEST.decode(answer) if one_sided else RECEIVER_TO_WRITER.decode(answer))


def piece_beyond_its_extent(lease: RemoteLease) -> str:
    """The end of a write says the checksum of bytes that are not its own."""
    return _ended(lease, PieceHeader(extent=0, offset=0, nbytes=1 << 40, checksum=1))


def piece_of_less_than_nothing(lease: RemoteLease) -> str:
    """And so of all from there to the pool's end."""
    return _ended(lease, PieceHeader(extent=0, offset=0, nbytes=-1, checksum=1))


def _ended(lease: RemoteLease, piece: PieceHeader) -> str:
    with connected(lease.pool.endpoint) as wire:
        _begin(wire, lease)
        wire.send(GUEST_TO_HOST.encode(End(write=1, landed=True, pieces=[piece])))
        return _kind(HOST_TO_GUEST.decode(wire.answer()))


def _kind(answer: object) -> str:
    return f"refused: {answer.kind}" if isinstance(answer, Rejected) else type(answer).__name__


_MESSAGES: tuple[Fault, ...] = (payload_cut_short, frame_shorter_than_said, frame_above_a_message, frame_without_end)
_ONE_SIDED: tuple[Fault, ...] = (
    message_cut_short,
    message_without_its_end,
    piece_beyond_its_extent,
    piece_of_less_than_nothing,
    attached_twice,
    frame_without_end,
)

FAULTS: Mapping[str, tuple[Fault, ...]] = {
    "zmq": _MESSAGES, "shm": _ONE_SIDED, "mooncake": _ONE_SIDED, "cuda-ipc": _ONE_SIDED,
}  # fmt: skip
