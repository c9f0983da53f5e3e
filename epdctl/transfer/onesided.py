"""Transports whose writers put bytes into a peer's memory themselves.

Guests are those who write here, Hosts those we write to. Around every write stands one order: ask, write, say that it
is done; when the answer to that has come, the bytes are in the slot and the receiver knows the lease to be alive.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from epdctl.errors import DeadlineExceeded, PeerGone
from epdctl.transfer.base import LandingPool, Piece
from epdctl.transfer.guests import Guests
from epdctl.transfer.hosts import Host, Source
from epdctl.transfer.landing import Owner
from epdctl.transfer.movers import Moved, Mover
from epdctl.wire.transfer import PoolAddress, RemoteLease

__all__ = ["OneSidedTransport"]

CLOSE_SECONDS = 0.3  # for bytes under way when this process is about to leave

T = TypeVar("T")


class OneSidedTransport:
    """A Transport."""

    def __init__(self, endpoint: str, owner: Owner, mover: Mover) -> None:
        self.moved = Moved()
        self._owner = owner
        self._mover = mover
        self._guests = Guests(endpoint, owner, mover.settle_seconds)
        self._peers: dict[str, Host] = {}
        self._retiring: dict[Host, asyncio.Task[None]] = {}

    @property
    def endpoint(self) -> str:
        return self._guests.endpoint

    @property
    def note(self) -> str:
        return self._mover.note

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return self._mover.allocate(nbytes, device)

    def register(self, pool: LandingPool) -> PoolAddress:
        return self._guests.register(pool, self._mover.locate(pool.name, pool.memory), self._mover.backend)

    async def greet(self, endpoint: str) -> None:
        peer = self._peer(endpoint)
        task = asyncio.ensure_future(peer.greet())
        peer.work(task)
        await task

    def made(self) -> object | None:
        return self._mover.made()

    async def write(
        self, lease: RemoteLease, pieces: Sequence[Piece], *, seconds: float, made: object | None = None
    ) -> None:
        peer, stop = self._keeper(lease) or self._peer(lease.pool.endpoint), threading.Event()
        there = Source(pieces, made or self._mover.made())
        await _until(peer, peer.write(lease, there, stop), _Bound(lease, seconds, stop))

    async def open_slot(self, lease: RemoteLease, *, seconds: float) -> torch.Tensor | None:
        peer, stop = self._peer(lease.pool.endpoint), threading.Event()
        return await _until(peer, peer.open_slot(lease, stop), _Bound(lease, seconds, stop))

    def drop_slot(self, lease: RemoteLease) -> None:
        if (peer := self._keeper(lease) or self._peers.get(lease.pool.endpoint)) is not None:
            peer.drop_slot(lease)

    def _keeper(self, lease: RemoteLease) -> Host | None:
        """The peer that was withdrawn since the slot was opened there."""
        return next((peer for peer in self._retiring if peer.keeps(lease)), None)

    def _peer(self, endpoint: str) -> Host:
        peer = self._peers.get(endpoint)
        if peer is not None and peer.broken:  # another process answers there by now
            self.withdraw(endpoint)
            peer = None
        if peer is None:
            peer = self._peers[endpoint] = Host(endpoint, self._owner, self._mover, self.moved)
        return peer

    def bound_adrift(self) -> None:
        for peer in self._peers.values():
            peer.bound_adrift()

    def withdraw(self, endpoint: str) -> None:
        if (peer := self._peers.pop(endpoint, None)) is not None:
            task = asyncio.get_running_loop().create_task(peer.retire(PeerGone(f"{endpoint} was withdrawn")))
            self._retiring[peer] = task
            task.add_done_callback(lambda _: self._retiring.pop(peer))

    async def close(self) -> None:
        gone = PeerGone("this transport was closed")
        before = list(self._retiring.values())
        for task in before:
            task.cancel()
        # those too whose task was cancelled before it began
        retiring = [peer.retire(gone, CLOSE_SECONDS) for peer in [*self._retiring, *self._peers.values()]]
        await asyncio.gather(*before, *retiring, return_exceptions=True)
        self._peers.clear()
        self._guests.close()
        self._mover.close()


@dataclass(frozen=True, slots=True)
class _Bound:
    """What ends a wait from outside."""

    lease: RemoteLease
    seconds: float
    stop: threading.Event


async def _until(peer: Host, work: Awaitable[T], bound: _Bound) -> T:
    """The result of ``work``, unless its peer goes or its time ends; then it goes on by itself to an orderly end."""
    task = asyncio.ensure_future(work)
    peer.work(task)
    try:
        either: set[asyncio.Future[Any]] = {task, peer.gone}
        await asyncio.wait(either, timeout=bound.seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not task.cancelled():
            return task.result()
        if peer.gone.done():
            peer.gone.result()
        raise DeadlineExceeded(f"{bound.lease.pool.owner} did not take the bytes within {bound.seconds:.1f} s")
    finally:
        if not task.done():
            bound.stop.set()
