"""The two ends of a transfer as processes of their own, which do what they are told over a pipe."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
import torch

from epdctl.errors import EpdError, PoolExhausted
from epdctl.ids import Incarnation, RankName
from epdctl.transfer import landing
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.base import Piece, Transport
from epdctl.transfer.landing import Owner
from epdctl.transfer.leases import SlotState
from epdctl.transfer.mooncake_engine import PROTOCOLS, Way
from epdctl.transfer.open import BACKENDS, Opening
from epdctl.transfer.pool import Pool
from epdctl.wire.config import TransferConfig
from epdctl.wire.transfer import RemoteLease
from epdctl.wire.variables import environment
from tests.support.halfway import Halfway
from tests.support.rude_writers import FAULTS

__all__ = [
    "POOL_BYTES", "End", "decoded", "device_of", "encoded", "open_at", "pattern", "receiving", "settle", "writing",
]  # fmt: skip

GUARD_SECONDS = 60.0
POOL_BYTES = 1 << 20

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.transfer_ends", "epdctl.transfer.mooncake"])


def pattern(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def device_of(backend: str) -> torch.device:
    """Where this backend's data is."""
    return torch.device("cuda:0" if backend == "cuda-ipc" else "cpu")


def open_at(backend: str, endpoint: str, rank: str, token: str = "secret", *, checksum: bool = False) -> Transport:
    os.environ |= environment("mooncake", "tcp")  # as the plan gives it to a rank
    owner = Owner(RankName(rank), Incarnation(1), token, checksum)
    config = TransferConfig(backend=backend, protocol="tcp" if backend == "mooncake" else "")
    return BACKENDS[backend](Opening(endpoint, owner, config, device_of(backend)))


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

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

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
def writing(backend: str, sockets: Path, name: str = "encoder/0", **environ: str) -> Iterator[End]:
    """Orders: write(lease, bytes, seed, token, how), and the name of a fault of rude_writers (lease); half or
    half_given_up (lease, bytes, seed), which stops when half of the bytes are there; go_on, which answers when the rest
    was tried; ended, which says how that write ended.

    Answers: "done", or the error's name and text; of a fault, what came of it.
    """
    with _started(_writer, backend, str(sockets), name, environ) as end:
        yield end


@contextmanager
def receiving(backend: str, endpoint: str, nbytes: int = POOL_BYTES) -> Iterator[End]:
    """Orders: lease(bytes) → the lease as JSON, or the error's name; sum → of the whole pool; free → bytes, all leases
    released; freed → bytes, when none is in quarantine.
    """
    with _started(_receiver, backend, endpoint, nbytes) as end:
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


def _writer(pipe: Connection, backend: str, sockets: str, name: str, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    transports: dict[tuple[str, str], Transport] = {}
    gate = Halfway(backend)
    halves: list[asyncio.Task[str]] = []
    faults = {fault.__name__: fault for fault in FAULTS[backend]}

    def transport(token: str, how: str) -> Transport:
        if (token, how) not in transports:
            endpoint = f"ipc://{sockets}/{name.replace('/', '-')}.{len(transports)}"
            other = f"{name}{len(transports)}"  # one process with two links of one name would have one at a time
            transports[token, how] = open_at(backend, endpoint, other, token, checksum=how == "broken")
        return transports[token, how]

    async def obey(
        verb: str, lease: bytes = b"", nbytes: int = 0, seed: int = 0, token: str = "secret", how: str = ""
    ) -> Any:
        match verb:
            case "go_on":
                gate.let_go()
                return await asyncio.to_thread(gate.moved.wait, GUARD_SECONDS)
            case "ended":
                return await halves.pop()
        target = decoded(lease)
        if verb in faults:
            return await asyncio.to_thread(faults[verb], target)
        through = transport(token, how)
        if how == "broken":
            landing.sums_of = lambda pieces: [1] * len(pieces)
        data = pattern(nbytes, seed).to(device_of(backend))
        if verb == "write":
            return await _outcome(through, target, data)
        gate.arm(gives_up=verb == "half_given_up")
        halves.append(asyncio.create_task(_outcome(through, target, data)))
        return await asyncio.to_thread(gate.reached.wait, GUARD_SECONDS)

    _obey(pipe, obey)


async def _outcome(transport: Transport, lease: RemoteLease, data: torch.Tensor) -> str:
    try:
        await transport.write(lease, [Piece(data, 0)], seconds=GUARD_SECONDS)
    except EpdError as error:
        return f"{type(error).__name__}: {error.message}"
    return "done"


def _receiver(pipe: Connection, backend: str, endpoint: str, size: int) -> None:
    kept: list[Any] = []

    async def obey(verb: str, nbytes: int = 0) -> Any:
        if not kept:
            settle(0.01)
            transport = open_at(backend, endpoint, "prefill/0")
            pool = Pool("embeddings", transport.allocate(size, device_of(backend)), RangeAllocator(size))
            kept.extend([transport, pool, transport.register(pool)])
        _, pool, address = kept
        match verb:
            case "lease":
                try:
                    return encoded(pool.lease(nbytes, "request", seconds=GUARD_SECONDS).remote(address))
                except PoolExhausted as error:
                    return type(error).__name__
            case "free":
                for lease in pool.leases.live():
                    if pool.leases.state(lease.id) is not SlotState.QUARANTINED:
                        pool.release(lease.id)
                pool.check()
                return pool.allocator.free
            case "freed":
                freed = asyncio.Event()
                pool.freed = freed.set
                while pool.quarantined_bytes:
                    freed.clear()
                    await freed.wait()
                return pool.allocator.free
            case _:
                return int(pool.memory.sum())

    _obey(pipe, obey)


def decoded(lease: bytes) -> RemoteLease:
    return msgspec.json.decode(lease, type=RemoteLease, dec_hook=lambda kind, value: kind(value))


def encoded(lease: RemoteLease) -> bytes:
    return msgspec.json.encode(lease, enc_hook=str)


def settle(seconds: float, patch: Callable[[dict[str, Way], str, Way], None] = dict.__setitem__) -> None:
    """So long is waited for what a dead writer had sent by an engine."""
    patch(PROTOCOLS, "tcp", replace(PROTOCOLS["tcp"], settle_seconds=seconds))
