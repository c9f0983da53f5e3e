"""The receiving half of transports whose writers write by themselves: who is let in, where, and when it has stopped.

No byte passes through here. A writer attaches once with the cluster's token, and only then learns where the memory is.
Every write is announced and ended by message. One that nobody ends, or that was given up while its bytes may move on,
is over when its writer's process is dead. Where checksums came with its end, they are verified on a thread, and the
write is over when that is done.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import assert_never

from epdctl.errors import PeerGone, RegistrationFailed, StaleGeneration, TransferError
from epdctl.transfer.base import LandingPool
from epdctl.transfer.deaths import DeathWatch
from epdctl.transfer.landing import Owner, Refusal, kind_of, payload, place_of, same_token, verify
from epdctl.wire.sockets import Inbox, Sender
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
    PoolAddress,
    PoolLocation,
    Rejected,
)

__all__ = ["Guests"]

log = logging.getLogger(__name__)

MAX_GUESTS = 1024  # links of living processes; more is a writer that attaches without end
MAX_CHECKS = 1024  # writes whose checksums wait to be verified, one after the other


@dataclass(frozen=True, slots=True)
class _Visit:
    """One write under way."""

    pool: LandingPool
    lease: int
    extents: Sequence[Extent]
    generation: int


@dataclass(slots=True)
class _Guest:
    """One link of one writer's process."""

    name: str  # rank and incarnation
    watch: DeathWatch | None = None
    visits: dict[int, _Visit] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)  # inside all the same: until verified, or as long as the process lives

    def leave(self, write: int) -> _Visit:
        visit = self.visits.pop(write)
        self.ended.discard(write)
        visit.pool.leave(visit.lease, self.name)
        return visit


class Guests:
    """``settle_seconds``: how long after a writer's death its bytes may still be on their way."""

    def __init__(self, endpoint: str, owner: Owner, settle_seconds: float) -> None:
        self._owner = owner
        self._settle_seconds = settle_seconds
        self._session = secrets.randbits(63)
        self._pools: dict[str, LandingPool] = {}
        self._locations: list[PoolLocation] = []
        self._guests: dict[Sender, _Guest] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._checks: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(1, "checksums")
        self._inbox: Inbox[GuestToHost] = Inbox(endpoint, GUEST_TO_HOST, self._arrived)

    @property
    def endpoint(self) -> str:
        return self._inbox.endpoint

    def register(self, pool: LandingPool, location: PoolLocation, backend: str) -> PoolAddress:
        """Raises RegistrationFailed when a pool of this name is there."""
        if pool.name in self._pools:
            raise RegistrationFailed(f"a pool called {pool.name} is registered already")
        self._pools[pool.name] = pool
        self._locations.append(location)
        rank, incarnation = self._owner.rank, self._owner.incarnation
        return PoolAddress(owner=rank, incarnation=incarnation, pool=pool.name, backend=backend, endpoint=self.endpoint)

    def _arrived(self, sender: Sender, message: GuestToHost, _: list[memoryview]) -> None:
        answer: HostToGuest | None
        match message:
            case Attach():
                answer = self._attach(sender, message)
            case Begin():
                answer = self._begin(sender, message)
            case End():
                answer = self._end(sender, message)
            case _:
                assert_never(message)
        if answer is not None:
            self._reply(sender, answer)

    def _reply(self, sender: Sender, answer: HostToGuest) -> None:
        if isinstance(answer, Rejected):
            log.warning("refused a writer: %s", answer.text)
        try:
            self._inbox.reply(sender, answer, HOST_TO_GUEST)
        except PeerGone as error:
            log.info("a writer left before its answer: %s", error)

    def _attach(self, sender: Sender, message: Attach) -> HostToGuest:
        if not same_token(message.token, self._owner.token):
            return Rejected(write=0, kind="token", text="the writer belongs to another cluster")
        if sender in self._guests:  # what it has begun stays its own
            return Attached(session=self._session, pools=list(self._locations))
        if len(self._guests) >= MAX_GUESTS:
            self._forget_idle()
        if len(self._guests) >= MAX_GUESTS:
            return Rejected(write=0, kind="full", text=f"{len(self._guests)} writers are attached already")
        guest = _Guest(f"{message.rank}.{message.incarnation}")
        try:
            guest.watch = DeathWatch(message.pid, message.born, lambda: self._died(sender))
        except (ProcessLookupError, OverflowError):
            return Rejected(write=0, kind="gone", text=f"there is no such process {message.pid} here")
        self._forget_idle(guest.name)
        self._guests[sender] = guest
        return Attached(session=self._session, pools=list(self._locations))

    def _forget_idle(self, name: str | None = None) -> None:
        """Links that nothing is written over, all or those of one process, which has a new one; one that is still used
        attaches anew."""
        for sender, guest in list(self._guests.items()):
            if not guest.visits and name in (None, guest.name):
                self._dismiss(sender)

    def _dismiss(self, sender: Sender) -> _Guest:
        guest = self._guests.pop(sender)
        if guest.watch is not None:
            guest.watch.close()
        return guest

    def _begin(self, sender: Sender, message: Begin) -> HostToGuest:
        guest, write = self._guests.get(sender), message.write
        if guest is None or message.session != self._session:
            return Rejected(write=write, kind="stranger", text="the writer has not attached to this process")
        if write in guest.visits:
            return Rejected(write=write, kind="frames", text=f"write {write} has begun already")
        try:
            pool = self._pools.get(message.pool)
            if pool is None:
                raise StaleGeneration(f"no pool is called {message.pool!r}")
            extents = pool.enter(message.lease, message.generation, guest.name)
        except TransferError as error:
            return Rejected(write=write, kind=kind_of(error), text=error.message)
        if not extents:
            return Landed(write=write)
        guest.visits[write] = _Visit(pool, message.lease, extents, message.generation)
        return Admitted(write=write, extents=list(extents))

    def _end(self, sender: Sender, message: End) -> HostToGuest | None:
        """None: the answer comes when the bytes have been verified."""
        guest, write = self._guests.get(sender), message.write
        if guest is None or write not in guest.visits or write in guest.ended:
            return Rejected(write=write, kind="stranger", text=f"write {write} has not begun")
        if not message.stopped:
            guest.ended.add(write)
            lease = guest.visits[write].lease
            log.warning("%s gave a write into lease %d up and may still be at it: its slot is kept", guest.name, lease)
            return Landed(write=write)
        if not message.landed or all(piece.checksum is None for piece in message.pieces):
            return _over(guest, message)
        if len(self._checks) >= MAX_CHECKS:
            return _over(guest, message, Refusal("full", f"{len(self._checks)} writes wait to be verified"))
        guest.ended.add(write)
        task = asyncio.get_running_loop().create_task(self._check(sender, message, guest.visits[write]))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)
        return None

    async def _check(self, sender: Sender, message: End, visit: _Visit) -> None:
        """While it lasts the writer counts as inside, so that nobody reads or is given these bytes."""
        wrong: TransferError | None = None
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, _verify, message, visit)
        except TransferError as error:
            wrong = error
        except Exception as error:  # its writer waits for an answer, whatever went wrong here
            log.exception("the bytes of write %d could not be verified", message.write)
            wrong = TransferError(f"they could not be verified: {type(error).__name__}: {error}")
        if (guest := self._guests.get(sender)) is not None:  # else it died meanwhile, which ends its writes
            self._reply(sender, _over(guest, message, wrong))

    def _died(self, sender: Sender) -> None:
        guest = self._dismiss(sender)
        if not guest.visits:
            return
        log.warning("%s died while it wrote into %d leases", guest.name, len(guest.visits))
        if not self._settle_seconds:
            _leave_all(guest)
            return
        for visit in guest.visits.values():
            visit.pool.dying(visit.lease)

        def settled() -> None:
            self._timers.discard(timer)
            _leave_all(guest)

        timer = asyncio.get_running_loop().call_later(self._settle_seconds, settled)
        self._timers.add(timer)

    @property
    def visits(self) -> int:
        """Writes under way."""
        return sum(len(guest.visits) for guest in self._guests.values())

    def close(self) -> None:
        self._inbox.close()
        for timer in self._timers:
            timer.cancel()
        for check in self._checks:
            check.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        for sender in list(self._guests):
            self._dismiss(sender)


def _leave_all(guest: _Guest) -> None:
    for write in list(guest.visits):
        guest.leave(write)


def _over(guest: _Guest, message: End, wrong: TransferError | None = None) -> HostToGuest:
    """The write has ended; ``wrong``: its bytes are not those that were sent."""
    write = message.write
    visit = guest.leave(write)
    try:
        if wrong is not None:
            raise wrong
        if message.landed:
            visit.pool.landing(visit.lease, visit.generation)
    except TransferError as error:
        return Rejected(write=write, kind=kind_of(error), text=error.message)
    return Landed(write=write)


def _verify(message: End, visit: _Visit) -> None:
    """Raises Refusal. On a thread: about 1 s for each GB."""
    for header in message.pieces:
        if header.checksum is not None:
            place = place_of(header, visit.extents)
            verify(header, payload(visit.pool.memory[place : place + header.nbytes]))
