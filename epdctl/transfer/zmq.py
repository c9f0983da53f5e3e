"""Bytes over ZMQ: zero-copy frames from the writer's memory, one copy into the slot, an answer per message."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from epdctl.errors import DeadlineExceeded, PeerGone
from epdctl.transfer.base import LandingPool, Piece
from epdctl.transfer.landing import Landings, Owner, Parcel, cut, payload, refused
from epdctl.transfer.tensors import require_room
from epdctl.wire.sockets import Buffer, Inbox, Link, Sender
from epdctl.wire.transfer import (
    RECEIVER_TO_WRITER,
    WRITER_TO_RECEIVER,
    PieceHeader,
    PoolAddress,
    ReceiverToWriter,
    Rejected,
    RemoteLease,
    Write,
    WriterToReceiver,
)

__all__ = ["ZmqTransport"]

log = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 1 << 20  # of a unix connection; 4 MiB gain nothing over it
WINDOW = 8  # unanswered messages to one peer, given up or not: what is kept in memory for it is 8 x 4 MiB


class ZmqTransport:
    """A Transport. Landing runs on the event loop, so a slot never changes while the loop's own code looks at it."""

    def __init__(self, endpoint: str, owner: Owner) -> None:
        self._landings = Landings(owner)
        self._inbox: Inbox[WriterToReceiver] = Inbox(endpoint, WRITER_TO_RECEIVER, self._arrived)
        self._peers: dict[str, _Peer] = {}

    @property
    def endpoint(self) -> str:
        return self._inbox.endpoint

    @property
    def note(self) -> str:
        return "zmq"

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        require_room(nbytes, device)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def register(self, pool: LandingPool) -> PoolAddress:
        return self._landings.register(pool, "zmq", self.endpoint)

    def _arrived(self, sender: Sender, write: Write, frames: list[memoryview]) -> None:
        answer = self._landed(write, frames)
        if isinstance(answer, Rejected):
            log.warning("refused bytes for %s: %s", write.pool, answer.text)
        try:
            self._inbox.reply(sender, answer, RECEIVER_TO_WRITER)
        except PeerGone as error:
            log.info("a writer left before its answer: %s", error)

    def _landed(self, write: Write, frames: list[memoryview]) -> ReceiverToWriter:
        """Whatever goes wrong is told: a writer that hears nothing waits, and keeps its bytes."""
        try:
            return self._landings.land(write, frames)
        except Exception as error:
            log.exception("bytes for %s could not be put there", write.pool)
            return Rejected(write=write.write, kind="frames", text=f"they could not be put there: {error}")

    async def greet(self, endpoint: str) -> None:
        """Its messages go wherever the first one goes."""

    def made(self) -> None:
        """Whoever reads the data to send it does so behind its device's work."""

    async def write(
        self, lease: RemoteLease, pieces: Sequence[Piece], *, seconds: float, made: object | None = None
    ) -> None:
        endpoint = lease.pool.endpoint
        peer = self._peers.get(endpoint)
        if peer is None:
            peer = self._peers[endpoint] = _Peer(endpoint, self._landings.owner)
        try:
            async with asyncio.timeout(seconds):
                await peer.write(lease, pieces)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{lease.pool.owner} did not take the bytes within {seconds:.1f} s") from error

    async def open_slot(self, lease: RemoteLease, *, seconds: float) -> torch.Tensor | None:
        return None

    def drop_slot(self, lease: RemoteLease) -> None:
        pass

    def bound_adrift(self) -> None:
        """Its receiver lands the bytes, and knows when that is over."""

    def withdraw(self, endpoint: str) -> None:
        if (peer := self._peers.pop(endpoint, None)) is not None:
            peer.close(PeerGone(f"{endpoint} was withdrawn"))

    async def close(self) -> None:
        for endpoint in list(self._peers):
            self.withdraw(endpoint)
        self._inbox.close()


class _Peer:
    """The writing half towards one endpoint."""

    def __init__(self, endpoint: str, owner: Owner) -> None:
        self._owner = owner
        self._numbers = itertools.count(1)
        self._unanswered: dict[int, asyncio.Future[None]] = {}
        self._window = asyncio.Semaphore(WINDOW)
        self._link: Link[ReceiverToWriter, WriterToReceiver] = Link(
            endpoint, RECEIVER_TO_WRITER, WRITER_TO_RECEIVER, self._answered, send_buffer=SEND_BUFFER_BYTES
        )
        self._link.watch(self._stands)

    def _stands(self, stands: bool) -> None:
        """What a broken connection carried has no answer any more."""
        if not stands:
            self._fail(PeerGone(f"the connection to {self._link.endpoint} broke"))

    async def write(self, lease: RemoteLease, pieces: Sequence[Piece]) -> None:
        """One that is given up leaves its messages with ZMQ; they keep their room until they are answered."""
        sent: list[asyncio.Future[None]] = []
        for parcel in cut(pieces):
            packed = await _packed(parcel, checksum=self._owner.checksum)
            await self._window.acquire()
            sent.append(self._send(lease, packed))
            for answered in [future for future in sent if future.done()]:
                answered.result()
        for future in sent:
            await asyncio.shield(future)

    def _send(self, lease: RemoteLease, packed: _Packed) -> asyncio.Future[None]:
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: self._settled(number, done))
        self._unanswered[number] = future
        write = Write(
            write=number,
            pool=lease.pool.pool,
            lease=lease.lease,
            generation=lease.generation,
            pieces=packed.headers,
            token=self._owner.token,
        )
        try:
            self._link.send(write, packed.frames)
        except PeerGone as error:
            future.set_exception(error)
        return future

    def _settled(self, number: int, done: asyncio.Future[None]) -> None:
        self._unanswered.pop(number, None)
        self._window.release()
        done.exception()  # seen: a write that failed on its first parcel, or was given up, does not look at the others

    def _answered(self, answer: ReceiverToWriter, _: Sequence[Buffer]) -> None:
        future = self._unanswered.get(answer.write)
        if future is None or future.done():
            return
        if isinstance(answer, Rejected):
            future.set_exception(refused(answer))
        else:
            future.set_result(None)

    def close(self, error: PeerGone) -> None:
        self._link.close()
        self._fail(error)

    def _fail(self, error: PeerGone) -> None:
        for future in list(self._unanswered.values()):
            if not future.done():
                future.set_exception(error)


class _Packed(NamedTuple):
    headers: list[PieceHeader]
    frames: list[memoryview]


async def _packed(parcel: Parcel, *, checksum: bool) -> _Packed:
    """On a GPU this waits for the kernels that make the data, and checksums take about 1 s for each GB; not on the
    loop."""

    def pack() -> _Packed:
        return _Packed(parcel.headers(checksum=checksum), [payload(piece.data) for piece in parcel.pieces])

    if checksum or any(piece.data.is_cuda for piece in parcel.pieces):
        return await asyncio.to_thread(pack)
    return pack()
