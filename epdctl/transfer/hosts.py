"""Towards one process whose memory we write into: attach once, then ask, write and say that it is done, lease by lease.

How bytes get there is a Mover's business.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from epdctl.errors import PeerGone, TransferError
from epdctl.transfer.base import Piece
from epdctl.transfer.landing import Owner, Parcel, Refusal, place_of, refused
from epdctl.wire.sockets import Link
from epdctl.wire.transfer import (
    GUEST_TO_HOST,
    HOST_TO_GUEST,
    Admitted,
    Attach,
    Attached,
    Begin,
    End,
    Extent,
    GuestToHost,
    HostToGuest,
    Landed,
    PieceHeader,
    PoolLocation,
    Rejected,
    RemoteLease,
)

__all__ = ["Host", "Moved", "Mover", "Put", "Remote"]

RETIRE_SECONDS = 30.0  # for bytes under way to a peer that was withdrawn, before its link is closed
LAST_SECONDS = 1.0  # for a peer that was withdrawn to hear that a write has ended


@dataclass(frozen=True, slots=True)
class Put:
    """``data``: 1-D uint8; ``place``: bytes from the start of the peer's pool."""

    data: torch.Tensor
    place: int


class Remote(Protocol):
    """One pool of one peer, as its writer sees it."""

    def put(self, puts: Sequence[Put], stop: threading.Event) -> None:
        """Write them all and return when they are there; or return early when ``stop`` is set. On a thread.

        Raises TransferError or PeerGone.
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

    def ready(self) -> object | None:
        """Called where the data was made: what ``wait`` must be given so that it is really there."""
        ...

    def wait(self, made: object | None) -> None:
        """On a thread, before the data is read."""
        ...

    def close(self) -> None: ...


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


@dataclass(slots=True)
class _Slot:
    """One lease that is being written to: its writes go one after another."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    opened: int | None = None  # the number of the write that has begun
    kept: bool = False  # it was begun by ``open_slot``, which counts as a user until it is ended
    extents: Sequence[Extent] = ()


class Host:
    """The writing half towards one process. ``gone`` ends with the error that every waiting write is to raise."""

    def __init__(self, endpoint: str, owner: Owner, mover: Mover, moved: Moved) -> None:
        self._endpoint = endpoint
        self._owner = owner
        self._mover = mover
        self._moved = moved
        self._thread = ThreadPoolExecutor(1, "transfer")
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[HostToGuest]] = {}
        self._slots: dict[int, _Slot] = {}  # by generation
        self._remotes: dict[str, Remote] = {}
        self._attached: asyncio.Future[Attached] | None = None
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.working: set[asyncio.Future[Any]] = set()
        self.broken = False
        self._link: Link[HostToGuest, GuestToHost] = Link(endpoint, HOST_TO_GUEST, GUEST_TO_HOST, self._answered)

    def worked(self, task: asyncio.Future[Any]) -> None:
        self.working.discard(task)
        if not task.cancelled():
            task.exception()  # seen: its writer may have given up

    # -- one write --

    async def write(self, lease: RemoteLease, pieces: Sequence[Piece], stop: threading.Event) -> None:
        made = self._mover.ready()
        async with _Turn(self._slots, lease.generation) as slot:
            if stop.is_set():
                return
            if slot.opened is None and not await self._begin(lease, slot):
                return
            landed = False
            try:
                await self._put(lease.pool.pool, _puts(pieces, slot.extents), made, stop)
                landed = not stop.is_set()
            finally:
                sums = self._sums(pieces) if landed else []
                answer = await self._end(slot, landed, sums)
            if isinstance(answer, Rejected):
                raise refused(answer)

    def _sums(self, pieces: Sequence[Piece]) -> list[PieceHeader]:
        return Parcel(pieces).headers(checksum=True) if self._owner.checksum else []

    async def _begin(self, lease: RemoteLease, slot: _Slot) -> bool:
        """Announce a write; False when nothing is left to write. Raises what the receiver answers."""
        session = (await self._attach()).session
        number = next(self._numbers)
        pool, generation = lease.pool.pool, lease.generation
        begin = Begin(write=number, session=session, pool=pool, lease=lease.lease, generation=generation)
        match await self._ask(number, begin):
            case Admitted(extents=extents):
                slot.opened, slot.extents = number, extents
                return True
            case Landed():
                return False
            case Rejected() as answer:
                if answer.kind == "stranger":
                    self.broken = True
                    raise PeerGone(f"another process listens at {self._endpoint} by now")
                raise refused(answer)
            case Attached():
                raise TransferError(f"{self._endpoint} answered a write with something else")

    async def _put(self, pool: str, puts: Sequence[Put], made: object | None, stop: threading.Event) -> None:
        remote = await self._remote(pool)
        todo = [put for put in puts if not _is_there(remote, put)]

        def work() -> None:
            self._mover.wait(made)
            began = time.perf_counter()
            remote.put(todo, stop)
            self._moved.add(sum(put.data.numel() for put in todo), time.perf_counter() - began)

        if made is None and sum(put.data.numel() for put in todo) <= self._mover.inline_bytes:
            work()
        else:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _end(self, slot: _Slot, landed: bool, sums: list[PieceHeader]) -> HostToGuest:
        number = slot.opened
        assert number is not None, "a write that has not begun"
        slot.opened = None
        slot.users -= slot.kept
        slot.kept = False
        return await self._ask(number, End(write=number, landed=landed, pieces=sums), last=True)

    # -- a slot that is written in place --

    async def open_slot(self, lease: RemoteLease, stop: threading.Event) -> torch.Tensor | None:
        async with _Turn(self._slots, lease.generation) as slot:
            await self._attach()
            remote = await self._remote(lease.pool.pool)
            extent = lease.extents[0]
            view = remote.view(extent.offset, extent.nbytes)
            if stop.is_set() or not await self._begin(lease, slot):
                return None
            slot.kept = True
            slot.users += 1
            if stop.is_set():
                self.drop_slot(lease)
            return view

    def drop_slot(self, lease: RemoteLease) -> None:
        slot = self._slots.get(lease.generation)
        if slot is None or slot.opened is None:
            return
        task = asyncio.ensure_future(self._drop(lease.generation))
        self.working.add(task)
        task.add_done_callback(self.worked)

    async def _drop(self, generation: int) -> None:
        async with _Turn(self._slots, generation) as slot:
            if slot.opened is not None:
                await self._end(slot, False, [])

    # -- the link --

    async def _attach(self) -> Attached:
        if self._attached is None:
            self._attached = asyncio.get_running_loop().create_future()
            owner = self._owner
            hello = Attach(token=owner.token, rank=owner.rank, incarnation=owner.incarnation, pid=os.getpid())
            self._link.send(hello)
        await self._or_gone(self._attached)
        return self._attached.result()

    async def _remote(self, pool: str) -> Remote:
        remote = self._remotes.get(pool)
        if remote is not None:
            return remote
        attached = await self._attach()
        location = next((one for one in attached.pools if one.pool == pool), None)
        if location is None:
            raise refused(Rejected(write=0, kind="stale", text=f"no pool is called {pool!r}"))
        loop = asyncio.get_running_loop()
        remote = await loop.run_in_executor(self._thread, self._mover.reach, location)
        if (known := self._remotes.setdefault(pool, remote)) is not remote:  # two writes came at once
            remote.close()
        return known

    async def _ask(self, number: int, message: GuestToHost, *, last: bool = False) -> HostToGuest:
        """``last``: its answer is waited for a little even when the peer was withdrawn, so that it hears of it."""
        future: asyncio.Future[HostToGuest] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        try:
            self._link.send(message)
            if last and self.gone.done():
                await asyncio.wait({future}, timeout=LAST_SECONDS)
            await self._or_gone(future)
            return future.result()
        finally:
            self._answers.pop(number, None)

    async def _or_gone(self, future: asyncio.Future[Any]) -> None:
        either: set[asyncio.Future[Any]] = {future, self.gone}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            self.gone.result()

    def _answered(self, answer: HostToGuest, _: Sequence[memoryview]) -> None:
        if isinstance(answer, Attached):
            if self._attached is not None and not self._attached.done():
                self._attached.set_result(answer)
        elif isinstance(answer, Rejected) and answer.write == 0:
            self._fail(refused(answer))
        elif (future := self._answers.get(answer.write)) is not None and not future.done():
            future.set_result(answer)

    def _fail(self, error: TransferError) -> None:
        """It will not have us: every write fails, and the next one asks anew."""
        self.broken = True
        if not self.gone.done():
            self.gone.set_exception(error)

    # -- the end --

    async def retire(self, error: PeerGone, seconds: float = RETIRE_SECONDS) -> None:
        """Fail what waits at once; close when what is being written has been ended in order, or cannot be."""
        if not self.gone.done():
            self.gone.set_exception(error)
        self.gone.exception()  # seen: there may be nobody who waits
        try:
            if self.working:
                await asyncio.wait(self.working, timeout=seconds)
        finally:
            self._close()

    def _close(self) -> None:
        for task in list(self.working):
            task.cancel()
        self._link.close()
        self._thread.submit(_close_all, list(self._remotes.values()))
        self._thread.shutdown(wait=False)
        self._remotes.clear()


class _Turn:
    """The right to write into one lease, in turn; the record of it goes with its last user."""

    def __init__(self, slots: dict[int, _Slot], generation: int) -> None:
        self._slots = slots
        self._generation = generation

    async def __aenter__(self) -> _Slot:
        slot = self._slots.setdefault(self._generation, _Slot())
        slot.users += 1
        try:
            await slot.lock.acquire()
        except BaseException:
            self._leave(slot)
            raise
        return slot

    async def __aexit__(self, *_: object) -> None:
        slot = self._slots[self._generation]
        slot.lock.release()
        self._leave(slot)

    def _leave(self, slot: _Slot) -> None:
        slot.users -= 1
        if not slot.users:
            del self._slots[self._generation]


def _puts(pieces: Sequence[Piece], extents: Sequence[Extent]) -> list[Put]:
    """Raises TransferError when a piece leaves its extent."""
    try:
        return [Put(piece.data, place_of(_header(piece), extents)) for piece in pieces]
    except Refusal as error:
        raise refused(Rejected(write=0, kind=error.kind, text=error.message)) from error


def _header(piece: Piece) -> PieceHeader:
    return PieceHeader(extent=piece.extent, offset=piece.offset, nbytes=piece.data.numel())


def _is_there(remote: Remote, put: Put) -> bool:
    """It was written in place."""
    view = remote.view(put.place, put.data.numel())
    return view is not None and view.data_ptr() == put.data.data_ptr()


def _close_all(remotes: Sequence[Remote]) -> None:
    for remote in remotes:
        remote.close()
