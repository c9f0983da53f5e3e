"""The two ends of a transfer as processes of their own, which do what they are told over a pipe."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
import torch

from epdctl.errors import EpdError
from epdctl.ids import Incarnation, RankName
from epdctl.transfer import landing
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.base import Piece, Transport
from epdctl.transfer.landing import Owner
from epdctl.transfer.open import BACKENDS, Opening
from epdctl.transfer.pool import Pool
from epdctl.wire import mooncake
from epdctl.wire.config import TransferConfig
from epdctl.wire.transfer import RemoteLease
from tests.support.rude_writers import FAULTS

__all__ = ["POOL_BYTES", "End", "decoded", "encoded", "open_at", "pattern", "receiving", "writing"]

GUARD_SECONDS = 60.0
POOL_BYTES = 1 << 20

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.transfer_ends", "epdctl.transfer.mooncake"])


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def open_at(backend: str, endpoint: str, rank: str, token: str = "secret", *, checksum: bool = False) -> Transport:
    os.environ |= mooncake.environment("tcp")  # as the plan gives it to a rank
    owner = Owner(RankName(rank), Incarnation(1), token, checksum)
    config = TransferConfig(backend=backend, protocol="tcp" if backend == "mooncake" else "")
    return BACKENDS[backend](Opening(endpoint, owner, config, torch.device("cpu")))


@dataclass
class End:
    process: ForkServerProcess
    pipe: Connection

    async def ask(self, *order: Any) -> Any:
        self.pipe.send(order)
        return await asyncio.to_thread(self._answer)

    def _answer(self) -> Any:
        assert self.pipe.poll(GUARD_SECONDS), "the other end does not answer"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def _started(target: Callable[..., None], *words: Any) -> Iterator[End]:
    ours, theirs = _context.Pipe()
    process = _context.Process(target=target, args=(theirs, *words), daemon=True)
    process.start()
    theirs.close()
    try:
        yield End(process, ours)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()


@contextmanager
def writing(backend: str, sockets: Path, name: str = "encoder/0") -> Iterator[End]:
    """Orders: write(lease, bytes, seed, token, how), stall(lease), and the name of a fault of rude_writers (lease).

    Answers: "done", or the error's name and text; of a fault, what came of it.
    """
    with _started(_writer, backend, str(sockets), name) as end:
        yield end


@contextmanager
def receiving(backend: str, endpoint: str) -> Iterator[End]:
    """Orders: lease(bytes) → the lease as JSON; sum → of the whole pool; free → bytes, all leases released."""
    with _started(_receiver, backend, endpoint) as end:
        yield end


def _obey(pipe: Connection, obey: Callable[..., Any]) -> None:
    torch.set_num_threads(1)

    async def work() -> None:
        while True:
            try:
                order = await asyncio.to_thread(pipe.recv)
            except EOFError:
                os._exit(0)
            pipe.send(await obey(*order))

    asyncio.run(work())


def _writer(pipe: Connection, backend: str, sockets: str, name: str) -> None:
    transports: dict[tuple[str, str], Transport] = {}
    faults = {fault.__name__: fault for fault in FAULTS[backend]}

    def transport(token: str, how: str) -> Transport:
        if (token, how) not in transports:
            endpoint = f"ipc://{sockets}/{name.replace('/', '-')}.{len(transports)}"
            transports[token, how] = open_at(backend, endpoint, name, token, checksum=how == "broken")
        return transports[token, how]

    async def obey(
        verb: str, lease: bytes, nbytes: int = 0, seed: int = 0, token: str = "secret", how: str = ""
    ) -> Any:
        target = decoded(lease)
        if verb in faults:
            return await asyncio.to_thread(faults[verb], target)
        if verb == "stall":  # in the middle of it, for ever
            if await transport(token, how).open_slot(target, seconds=GUARD_SECONDS) is None and backend == "zmq":
                await transport(token, how).write(target, [Piece(pattern(100, 1), 0)], seconds=GUARD_SECONDS)
            return "inside"
        if how == "broken":
            landing.sums_of = lambda pieces: [1] * len(pieces)
        try:
            await transport(token, how).write(target, [Piece(pattern(nbytes, seed), 0)], seconds=GUARD_SECONDS)
        except EpdError as error:
            return f"{type(error).__name__}: {error.message}"
        return "done"

    _obey(pipe, obey)


def _receiver(pipe: Connection, backend: str, endpoint: str) -> None:
    kept: list[Any] = []

    async def obey(verb: str, nbytes: int = 0) -> Any:
        if not kept:
            transport = open_at(backend, endpoint, "prefill/0")
            pool = Pool("embeddings", transport.allocate(POOL_BYTES, torch.device("cpu")), RangeAllocator(POOL_BYTES))
            kept.extend([transport, pool, transport.register(pool)])
        _, pool, address = kept
        match verb:
            case "lease":
                return encoded(pool.lease(nbytes, "request", seconds=GUARD_SECONDS).remote(address))
            case "free":
                for lease in pool.leases.live():
                    pool.release(lease.id)
                pool.check()
                return pool.allocator.free
            case _:
                return int(pool.memory.sum())

    _obey(pipe, obey)


def decoded(lease: bytes) -> RemoteLease:
    return msgspec.json.decode(lease, type=RemoteLease, dec_hook=lambda kind, value: kind(value))


def encoded(lease: RemoteLease) -> bytes:
    return msgspec.json.encode(lease, enc_hook=str)
