"""The transport within one process, of mono ranks: the same checks and errors as over a network, and no network.

Both ends share an Exchange. Tests put faults in by its ``passing`` hook, and leave nothing to chance.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

import torch

from epdctl.errors import DeadlineExceeded, PeerGone, RegistrationFailed
from epdctl.transfer.base import LandingPool, Piece
from epdctl.transfer.landing import Frame, Landings, Owner, cut, payload, refused
from epdctl.transfer.tensors import require_room
from epdctl.wire.transfer import PoolAddress, ReceiverToWriter, Rejected, RemoteLease, Write

__all__ = ["Exchange", "MemoryTransport", "Passing"]

Passing = Callable[[str, Write, Sequence[Frame]], Awaitable[Sequence[Frame]]]


async def _unharmed(_: str, __: Write, frames: Sequence[Frame]) -> Sequence[Frame]:
    return frames


class Exchange:
    """Who listens where. ``passing(endpoint, write, frames)`` sees every message on its way and returns its frames."""

    def __init__(self) -> None:
        self.passing: Passing = _unharmed
        self._listening: dict[str, Landings] = {}

    def listen(self, endpoint: str, landings: Landings) -> None:
        """Raises RegistrationFailed when somebody listens there."""
        if endpoint in self._listening:
            raise RegistrationFailed(f"{endpoint} is taken")
        self._listening[endpoint] = landings

    def leave(self, endpoint: str) -> None:
        self._listening.pop(endpoint, None)

    async def deliver(self, endpoint: str, write: Write, frames: Sequence[Frame]) -> ReceiverToWriter:
        """Raises PeerGone when nobody listens."""
        frames = await self.passing(endpoint, write, frames)
        landings = self._listening.get(endpoint)
        if landings is None:
            raise PeerGone(f"nobody listens at {endpoint}")
        return landings.land(write, frames)


class MemoryTransport:
    """A Transport whose peers live in this process."""

    def __init__(self, endpoint: str, owner: Owner, exchange: Exchange) -> None:
        self._endpoint = endpoint
        self._landings = Landings(owner)
        self._exchange = exchange
        self._numbers = itertools.count(1)
        self._writing: dict[str, set[asyncio.Task[None]]] = {}
        exchange.listen(endpoint, self._landings)

    @property
    def endpoint(self) -> str:
        return self._endpoint

    @property
    def note(self) -> str:
        return "memory"

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        require_room(nbytes, device)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def register(self, pool: LandingPool) -> PoolAddress:
        return self._landings.register(pool, "memory", self._endpoint)

    async def greet(self, endpoint: str) -> None:
        """It is all one memory."""

    def made(self) -> None:
        """Whoever reads the data to send it does so behind its device's work."""

    async def write(
        self, lease: RemoteLease, pieces: Sequence[Piece], *, seconds: float, made: object | None = None
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._write(lease, pieces))
        writing = self._writing.setdefault(lease.pool.endpoint, set())
        writing.add(task)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait([task])
            if task.cancelled():
                raise PeerGone(f"{lease.pool.endpoint} was withdrawn")
            task.result()
        except TimeoutError as error:
            raise DeadlineExceeded(f"{lease.pool.owner} did not take the bytes within {seconds:.1f} s") from error
        finally:
            task.cancel()
            writing.discard(task)

    async def _write(self, lease: RemoteLease, pieces: Sequence[Piece]) -> None:
        for parcel in cut(pieces):
            write = Write(
                write=next(self._numbers),
                pool=lease.pool.pool,
                lease=lease.lease,
                generation=lease.generation,
                pieces=parcel.headers(checksum=self._landings.owner.checksum),
                token=self._landings.owner.token,
            )
            frames: list[Frame] = [piece.data if piece.data.is_cuda else payload(piece.data) for piece in parcel.pieces]
            answer = await self._exchange.deliver(lease.pool.endpoint, write, frames)
            if isinstance(answer, Rejected):
                raise refused(answer)

    async def open_slot(self, lease: RemoteLease, *, seconds: float) -> torch.Tensor | None:
        return None

    def drop_slot(self, lease: RemoteLease) -> None:
        pass

    def bound_adrift(self) -> None:
        """Its receiver lands the bytes, and knows when that is over."""

    def withdraw(self, endpoint: str) -> None:
        for task in self._writing.pop(endpoint, ()):
            task.cancel()

    async def close(self) -> None:
        for endpoint in list(self._writing):
            self.withdraw(endpoint)
        self._exchange.leave(self._endpoint)
