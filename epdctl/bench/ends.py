"""``python -m epdctl.bench.ends``: one end of a measured transfer, or the ceiling beside it. Told what to do by lines.

Each line on standard input is one JSON order, each on standard output its answer. The end of the input is the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import torch

from epdctl.bench.digest import change, digest, total
from epdctl.engine.pages import PageAllocator
from epdctl.errors import TransferError
from epdctl.ids import Incarnation, RankName, RequestId
from epdctl.transfer.allocators import Allocator, PageExtents, RangeAllocator
from epdctl.transfer.base import Piece, Transport
from epdctl.transfer.landing import Owner
from epdctl.transfer.leases import Lease
from epdctl.transfer.onesided import OneSidedTransport
from epdctl.transfer.open import BACKENDS, Opening
from epdctl.transfer.pool import Pool
from epdctl.transfer.tensors import spec_of, spread
from epdctl.wire.config import TransferConfig
from epdctl.wire.encode import ENCODER_TO_LANGUAGE, EmbeddingLanded
from epdctl.wire.sockets import Inbox, Link
from epdctl.wire.transfer import Extent, RemoteLease

__all__ = ["main"]

LEASE_SECONDS = 600.0
WRITE_SECONDS = 120.0
TOLD, SUM, DIGEST = 0, 1, 2  # what is asked of the receiver


def _open(order: dict[str, Any], rank: str) -> Transport:
    """The transport that was ordered, as a rank opens it; over TCP where that was ordered of ZMQ."""
    name = RankName(rank)
    address = f"tcp://127.0.0.1:{_free_port()}" if order["tcp"] else f"ipc://{order['sockets']}/{name.file_stem}"
    owner = Owner(name, Incarnation(1), order["token"])
    config = TransferConfig(backend=order["backend"], protocol=order["protocol"])
    return BACKENDS[config.backend](Opening(address, owner, config, _device(order)))


def _device(order: dict[str, Any]) -> torch.device:
    return torch.device("cuda:0" if order["gpu"] else "cpu")


class Receiver:
    """Pools of every size, registered before the writer comes; sums what it is told has landed."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._transport = _open(order, "prefill/0")
        self._pools: dict[str, Pool] = {}
        self._leases: dict[str, Lease] = {}
        self._inbox: Inbox[EmbeddingLanded] = Inbox(
            f"ipc://{order['sockets']}/landed", ENCODER_TO_LANGUAGE, self._landed
        )
        self._device = _device(order)

    def open(self, order: dict[str, Any]) -> dict[str, Any]:
        return {
            "note": self._transport.note,
            "notify": self._inbox.endpoint,
            "leases": [self._open(size, order["page"], order["run"]) for size in order["sizes"]],
        }

    def _open(self, size: int, page: int, run: int) -> dict[str, Any]:
        """A pool, and a lease on all of it; if it has pages, in runs of so many and in no order."""
        pages = -(-size // page) if page else 0
        allocator = PageExtents(PageAllocator(pages + 1), page) if page else RangeAllocator(size)
        began = time.perf_counter()
        pool = Pool(f"{size}", self._transport.allocate((pages + 1) * page or size, self._device), allocator)
        address = self._transport.register(pool)
        _done(self._device)
        seconds = time.perf_counter() - began
        extents = _in_runs(allocator, pages, run) if page else allocator.take(size)
        lease = pool.leases.grant(extents, "bench", seconds=LEASE_SECONDS)
        self._pools[pool.name], self._leases[pool.name] = pool, lease
        remote = json.loads(msgspec.json.encode(lease.remote(address), enc_hook=str))
        return {"register_us": seconds * 1e6, "lease": remote}

    def _landed(self, sender: bytes, message: EmbeddingLanded, _: list[memoryview]) -> None:
        """Answers when it was told, by the clock of this host, and with what is asked for beyond that."""
        told = msgspec.structs.replace(message, attempt=TOLD, generation=time.perf_counter_ns())
        self._inbox.reply(sender, told, ENCODER_TO_LANGUAGE)
        if message.attempt != TOLD:
            parts = self._parts(message.request, message.spec.nbytes)
            found = digest(parts) if message.attempt == DIGEST else total(parts)
            self._inbox.reply(sender, msgspec.structs.replace(message, generation=found), ENCODER_TO_LANGUAGE)

    def _parts(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        for extent in self._leases[name].extents:
            if part := min(extent.nbytes, nbytes):
                yield self._pools[name].memory[extent.offset : extent.offset + part]
            nbytes -= part

    async def close(self) -> None:
        self._inbox.close()
        await self._transport.close()


class Writer:
    """Writes from memory of its own, or in place where that can be, times it, and has every write verified."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._transport = _open(order, "encoder/0")
        self._device = _device(order)
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._link: Link[EmbeddingLanded, EmbeddingLanded] = Link(
            order["notify"], ENCODER_TO_LANGUAGE, ENCODER_TO_LANGUAGE, self._answered
        )

    def _answered(self, message: EmbeddingLanded, _: list[memoryview]) -> None:
        self._answers[message.attempt].set_result(message.generation)

    async def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        lease = msgspec.convert(order["lease"], RemoteLease, dec_hook=lambda kind, value: kind(value))
        size = order["bytes"]
        data = self._transport.allocate(size, self._device) if order["pooled"] else _empty(size, self._device)
        data.view(torch.int64).random_()
        found = [await self._round(lease, data, order) for _ in range(1 + order["rounds"])][1:]  # the first connects
        return {name: [getattr(took, name) for took in found] for name in Took._fields}

    async def _round(self, lease: RemoteLease, data: torch.Tensor, order: dict[str, Any]) -> Took:
        """Two writes, of which the second is timed: it follows on a write, and not on what verifying left in caches."""
        one = self._in_place if order["in_place"] else self._copied
        await one(lease, data, order)
        took = await one(lease, data, order)
        await self._verify(lease, data)
        return took

    async def _copied(self, lease: RemoteLease, data: torch.Tensor, order: dict[str, Any]) -> Took:
        if order["opened"]:
            await self._transport.open_slot(lease, seconds=WRITE_SECONDS)
        change(data)
        _done(self._device)
        pieces = spread(data, lease.extents)
        before = self._moving
        began = time.perf_counter()
        await self._write(lease, pieces)
        heard = await self._ask(SUM if order["sum"] else TOLD, lease, data)
        summed = time.perf_counter() - began
        return Took(heard.seconds - began, summed if order["sum"] else None, self._moving - before or None)

    async def _in_place(self, lease: RemoteLease, data: torch.Tensor, _: dict[str, Any]) -> Took:
        """From the moment that the data is in its slot until the receiver may read it."""
        change(data)
        slot = await self._transport.open_slot(lease, seconds=WRITE_SECONDS)
        assert slot is not None, "this transport opens no slots"
        slot[: data.numel()].copy_(data)
        began = time.perf_counter()
        await self._write(lease, [Piece(slot[: data.numel()], 0)])
        heard = await self._ask(TOLD, lease, data)
        return Took(heard.seconds - began, None, None)

    async def _write(self, lease: RemoteLease, pieces: list[Piece]) -> None:
        await self._transport.write(lease, pieces, seconds=WRITE_SECONDS)

    @property
    def _moving(self) -> float:
        """Seconds of moving so far, where the transport counts them."""
        return self._transport.moved.seconds if isinstance(self._transport, OneSidedTransport) else 0.0

    async def _verify(self, lease: RemoteLease, data: torch.Tensor) -> None:
        """Outside of what is timed. Raises TransferError."""
        sent = digest(piece.data for piece in spread(data, lease.extents))
        if (await self._ask(DIGEST, lease, data)).found != sent:
            raise TransferError("what arrived is not what was sent")

    async def _ask(self, what: int, lease: RemoteLease, data: torch.Tensor) -> Heard:
        loop = asyncio.get_running_loop()
        self._answers = {each: loop.create_future() for each in {TOLD, what}}
        said = EmbeddingLanded(
            request=RequestId(lease.pool.pool),
            attempt=what,
            index=0,
            lease=lease.lease,
            generation=0,
            spec=spec_of(data),
        )
        self._link.send(said)
        return Heard(await self._answers[TOLD] / 1e9, await self._answers[what])

    async def close(self) -> None:
        self._link.close()
        await self._transport.close()


class Heard(NamedTuple):
    """``seconds``: when the receiver heard of a write, by time.perf_counter, which all processes of a host share."""

    seconds: float
    found: int


class Took(NamedTuple):
    """Seconds of one write: until the receiver may read, until it has read every byte, and of the movement alone."""

    written: float
    summed: float | None
    moving: float | None


def _in_runs(allocator: Allocator, pages: int, run: int) -> list[Extent]:
    extents = [extent for start in range(0, pages, run) for extent in allocator.take(min(run, pages - start))]
    random.Random(0).shuffle(extents)
    return extents


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _empty(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _done(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ceiling(order: dict[str, Any]) -> dict[str, Any]:
    """GB/s of a plain copy of each size: in memory, or from one GPU to the other."""
    devices = [torch.device(f"cuda:{index}") for index in (0, 1)] if order["gpu"] else [torch.device("cpu")] * 2
    rates = []
    for size in order["sizes"]:
        source, target = _empty(size, devices[0]).zero_(), _empty(size, devices[1]).zero_()
        seconds = [_timed_copy(source, target) for _ in range(order["rounds"])]
        rates.append(size / statistics.median(seconds) / 1e9)
    return {"rates": rates}


def _timed_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    _done(source.device)
    _done(target.device)
    began = time.perf_counter()
    target.copy_(source)
    _done(source.device)
    _done(target.device)
    return time.perf_counter() - began


def _facts() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "gpu": gpu, "visible_gpus": torch.cuda.device_count()}


async def _obey() -> None:
    loop = asyncio.get_running_loop()
    end: Receiver | Writer | None = None
    try:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            answer: dict[str, Any]
            match order["do"]:
                case "receive":
                    end = Receiver(order)
                    answer = end.open(order) | _facts()
                case "attach":
                    end = Writer(order)
                    answer = _facts()
                case "write":
                    assert isinstance(end, Writer), "attach comes first"
                    answer = await end.measure(order)
                case _:
                    answer = _ceiling(order) | _facts()
            print(json.dumps(answer), flush=True)
    finally:
        if end is not None:
            await end.close()


def main(run: Callable[..., None] = asyncio.run) -> None:
    run(_obey())


if __name__ == "__main__":
    main()
