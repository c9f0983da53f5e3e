"""Towards one process whose memory we write into: begin, write and say that it is done, lease by lease.

How bytes get there is a Mover's business.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from epdctl.errors import DeadlineExceeded, EpdError, OutOfReach, PeerGone, TransferError, WritesAdrift
from epdctl.transfer.base import Piece
from epdctl.transfer.calls import Calls
from epdctl.transfer.landing import Owner, Parcel, Refusal, place_of, refused
from epdctl.transfer.movers import Moved, Mover, Put, Remote
from epdctl.transfer.turns import Slot, Turn
from epdctl.wire.transfer import End, Extent, PieceHeader, Rejected, RemoteLease

__all__ = ["Host", "Source"]

log = logging.getLogger(__name__)

ATTACH_SECONDS = 30.0  # for a peer to let us in
GREET_SECONDS = 10.0  # for what was in the way to pass, and for a peer that is dead to be seen to be
GREET_PAUSE = 0.5  # between two tries
ADRIFT_SECONDS = 10.0  # less than a reader bears in quarantine; a peer that is gone or hangs is withdrawn before
RETIRE_SECONDS = 600.0  # for what was begun at a peer that was withdrawn to end, before its link is closed


@dataclass(frozen=True, slots=True)
class Source:
    """``made``: see Transport."""

    pieces: Sequence[Piece]
    made: object | None


class Host:
    """The writing half towards one process. ``working``: what must end before it can be closed in order."""

    def __init__(self, endpoint: str, owner: Owner, mover: Mover, moved: Moved) -> None:
        self._owner = owner
        self._mover = mover
        self._moved = moved
        self._thread = ThreadPoolExecutor(1, "transfer")
        self._slots: dict[int, Slot] = {}  # by generation
        self._remotes: dict[str, concurrent.futures.Future[Remote]] = {}
        self._adrift: list[Sequence[Piece]] = []  # may be read still; bounded by ``bound_adrift``
        self._adrift_since = math.inf
        self._calls = Calls(endpoint, owner)
        self._closed = False
        self.working: set[asyncio.Future[Any]] = set()

    @property
    def gone(self) -> asyncio.Future[None]:
        """Ends with the error that every waiting write is to raise."""
        return self._calls.gone

    @property
    def broken(self) -> bool:
        """Another process answers there by now, or it will not have us."""
        return self._calls.broken

    def work(self, task: asyncio.Future[Any]) -> None:
        """It must end before this can be closed in order."""
        self.working.add(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Future[Any]) -> None:
        self.working.discard(task)
        if not task.cancelled():
            task.exception()  # seen: its writer may have given up

    async def greet(self) -> None:
        """See Transport."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + GREET_SECONDS
        while True:
            try:
                async with asyncio.timeout(ATTACH_SECONDS):
                    attached = await self._calls.attach()
                for location in attached.pools:
                    await self._remote(location.pool)
            except TimeoutError as error:
                text = f"{self._calls.endpoint} did not let us in within {ATTACH_SECONDS:g} s"
                raise DeadlineExceeded(text) from error
            except EpdError as error:
                if self.gone.done():
                    self.gone.result()
                if loop.time() >= ends and isinstance(error, TransferError):
                    raise OutOfReach(f"the memory behind {self._calls.endpoint}: {error.message}") from error
                if loop.time() >= ends:
                    raise
                await asyncio.wait({self.gone}, timeout=GREET_PAUSE)
            else:
                log.info("the memory behind %s is open", self._calls.endpoint)
                return

    # -- one write --

    async def write(self, lease: RemoteLease, source: Source, stop: threading.Event) -> None:
        pieces = source.pieces
        async with Turn(self._slots, lease.generation) as slot:
            if stop.is_set():
                return
            if self.gone.done():
                self.gone.result()
            if slot.opened is None and not await self._begin(lease, slot):
                return
            landed, stopped, sums = False, True, list[PieceHeader]()
            try:
                puts = await self._todo(lease.pool.pool, _puts(pieces, slot.extents))
                stopped = False  # an error of what moves the bytes does not say that they have ceased to move
                await self._move(puts, source.made, stop)
                stopped = True
                sums = await self._sums(pieces)
                landed = not stop.is_set()
            finally:
                if not stopped:
                    self._adrift.append(pieces)
                    self._adrift_since = min(self._adrift_since, asyncio.get_running_loop().time())
                end = End(write=slot.end(), landed=landed, stopped=stopped, pieces=sums)
                answer = await self._calls.end(end)
            if isinstance(answer, Rejected):
                raise refused(answer)

    def bound_adrift(self) -> None:
        """See Transport. Whoever began these writes must go before the peer has to, who did nothing wrong."""
        if asyncio.get_running_loop().time() - self._adrift_since > ADRIFT_SECONDS:
            raise WritesAdrift(
                f"{len(self._adrift)} writes to {self._calls.endpoint} were given up by what moves the bytes, "
                "which may still be at them: their slots come back when this process ends"
            )

    async def _sums(self, pieces: Sequence[Piece]) -> list[PieceHeader]:
        """On the thread: about 1 s for each GB."""
        if not self._owner.checksum:
            return []
        parcel = Parcel(pieces)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: parcel.headers(checksum=True))

    async def _begin(self, lease: RemoteLease, slot: Slot) -> bool:
        """False when nothing is left to write. Raises what the receiver answers."""
        begun = await self._calls.begin(lease)
        if begun is None:
            return False
        slot.opened, slot.extents = begun
        return True

    async def _todo(self, pool: str, puts: Sequence[Put]) -> _Todo:
        remote = await self._remote(pool)
        return _Todo(remote, [put for put in puts if not _is_there(remote, put)])

    async def _move(self, todo: _Todo, made: object | None, stop: threading.Event) -> None:
        def work() -> None:
            self._mover.wait(made)
            began = time.perf_counter()
            todo.remote.put(todo.puts, stop)
            self._moved.add(todo.nbytes, time.perf_counter() - began)

        if made is None and todo.nbytes <= self._mover.inline_bytes:
            work()
        else:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # -- a slot that is written in place --

    async def open_slot(self, lease: RemoteLease, stop: threading.Event) -> torch.Tensor | None:
        async with Turn(self._slots, lease.generation) as slot:
            await self._calls.attach()
            remote = await self._remote(lease.pool.pool)
            extent = lease.extents[0]
            view = remote.view(extent.offset, extent.nbytes)
            if slot.opened is not None:  # open already: one write, with one end
                return view
            if stop.is_set() or not await self._begin(lease, slot):
                return None
            self.work(slot.keep())
            if stop.is_set():
                self.drop_slot(lease)
            return view

    def keeps(self, lease: RemoteLease) -> bool:
        """Its slot was opened here, and is to be ended here."""
        slot = self._slots.get(lease.generation)
        return slot is not None and slot.kept is not None

    def drop_slot(self, lease: RemoteLease) -> None:
        slot = self._slots.get(lease.generation)
        if slot is None or slot.opened is None:
            return
        self.work(asyncio.ensure_future(self._drop(lease.generation)))

    async def _drop(self, generation: int) -> None:
        async with Turn(self._slots, generation) as slot:
            if slot.opened is not None:
                await self._calls.end(End(write=slot.end(), landed=False))

    # -- the peer's memory --

    async def _remote(self, pool: str) -> Remote:
        """Reached once, whoever asks first; what failed is tried again."""
        if self.gone.done():
            self.gone.result()
        if pool not in self._remotes:
            attached = await self._calls.attach()
            location = next((one for one in attached.pools if one.pool == pool), None)
            if location is None:
                raise refused(Rejected(write=0, kind="stale", text=f"no pool is called {pool!r}"))
            if pool not in self._remotes:
                self._remotes[pool] = self._thread.submit(self._mover.reach, location)
        reaching = self._remotes[pool]
        try:
            return await asyncio.shield(asyncio.wrap_future(reaching))
        except Exception:
            if self._remotes.get(pool) is reaching:
                del self._remotes[pool]
            raise

    # -- the end --

    async def retire(self, error: PeerGone, seconds: float = RETIRE_SECONDS) -> None:
        """Fail what waits at once; close when what was begun has been ended in order, or cannot be."""
        self._calls.hang_up(error)
        try:
            async with asyncio.timeout(seconds):
                while self.working:
                    await asyncio.wait(self.working)
        except TimeoutError:
            log.warning("%s was left with %d writes that have not ended", self._calls.endpoint, len(self.working))
        finally:
            self._close()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for task in list(self.working):
            task.cancel()
        self._calls.close()
        self._thread.submit(_close_all, list(self._remotes.values()))
        self._thread.shutdown(wait=False)
        self._remotes.clear()
        self._adrift.clear()


@dataclass(frozen=True, slots=True)
class _Todo:
    """What is not there yet, and whom to give it."""

    remote: Remote
    puts: Sequence[Put]

    @property
    def nbytes(self) -> int:
        return sum(put.data.numel() for put in self.puts)


def _puts(pieces: Sequence[Piece], extents: Sequence[Extent]) -> list[Put]:
    """Raises TransferError when a piece leaves its extent."""
    try:
        return [Put(piece.data, place_of(piece, extents)) for piece in pieces]
    except Refusal as error:
        raise refused(Rejected(write=0, kind=error.kind, text=error.message)) from error


def _is_there(remote: Remote, put: Put) -> bool:
    """It was written in place."""
    view = remote.view(put.place, put.data.numel())
    return view is not None and view.data_ptr() == put.data.data_ptr()


def _close_all(reached: Sequence[concurrent.futures.Future[Remote]]) -> None:
    """On the thread that reached them, so that each has ended."""
    for future in reached:
        if not future.cancelled() and future.exception() is None:
            future.result().close()
