"""What a writer says to the process whose memory it writes into: it attaches once, then asks, and every ask has an
answer or the end of that process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import Any

from epdctl.errors import EpdError, PeerGone, TransferError
from epdctl.transfer.deaths import birth
from epdctl.transfer.landing import Owner, refused
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
    Rejected,
    RemoteLease,
)

__all__ = ["Calls"]

LAST_SECONDS = 1.0  # for a peer that was withdrawn to hear that a write has ended


class Calls:
    """Questions to one process. ``gone`` ends with the error that everybody who waits is to raise.

    ``broken``: it will not have us, or is another process by now; the next writer must attach anew.
    """

    def __init__(self, endpoint: str, owner: Owner) -> None:
        self.endpoint = endpoint
        self._owner = owner
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[HostToGuest]] = {}
        self._attached: asyncio.Future[Attached] | None = None
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.broken = False
        self._link: Link[HostToGuest, GuestToHost] = Link(endpoint, HOST_TO_GUEST, GUEST_TO_HOST, self._answered)

    async def attach(self) -> Attached:
        """Once for all writes. Raises what ``gone`` ends with."""
        if self._attached is None:
            owner, pid = self._owner, os.getpid()
            hello = Attach(token=owner.token, rank=owner.rank, incarnation=owner.incarnation, pid=pid, born=birth(pid))
            self._link.send(hello)
            self._attached = asyncio.get_running_loop().create_future()
        await self._or_gone(self._attached)
        return self._attached.result()

    async def begin(self, lease: RemoteLease) -> tuple[int, Sequence[Extent]] | None:
        """Announce a write: its number and where it may go; None when nothing is left to write.

        Raises what the receiver answers.
        """
        session = (await self.attach()).session
        number = next(self._numbers)
        pool, generation = lease.pool.pool, lease.generation
        begin = Begin(write=number, session=session, pool=pool, lease=lease.lease, generation=generation)
        match await self._begun(number, begin):
            case Admitted(extents=extents):
                return number, extents
            case Landed():
                return None
            case Rejected() as answer:
                if answer.kind == "stranger":
                    self.broken = True
                    raise PeerGone(f"another process listens at {self.endpoint} by now")
                raise refused(answer)
            case Attached():
                raise TransferError(f"{self.endpoint} answered a write with something else")

    async def _begun(self, number: int, begin: Begin) -> HostToGuest:
        """A peer that was given up before it answered may still let us in: then it sees us leave again."""
        try:
            return await self._ask(number, begin)
        except EpdError:
            with contextlib.suppress(EpdError):
                await self.end(End(write=number, landed=False))
            raise

    async def end(self, end: End) -> HostToGuest:
        return await self._ask(end.write, end, last=True)

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
            self.broken = True
            self.hang_up(refused(answer))
        elif (future := self._answers.get(answer.write)) is not None and not future.done():
            future.set_result(answer)

    def hang_up(self, error: TransferError | PeerGone) -> None:
        """Everybody who waits, or will, raises ``error``; only the ends of writes are still told."""
        if not self.gone.done():
            self.gone.set_exception(error)
        self.gone.exception()  # seen: there may be nobody who waits

    def close(self) -> None:
        self._link.close()
