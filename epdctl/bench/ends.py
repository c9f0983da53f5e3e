"""``python -m epdctl.bench.ends``: one end of a measured transfer, or the ceiling beside it. Told what to do by lines.

Each line on standard input is one JSON order, each on standard output its answer. The end of the input is the end.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from epdctl.errors import TransferError
from epdctl.ids import Incarnation, LocalGpu, RankName, RequestId, RunId
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.base import Piece, Transport
from epdctl.transfer.leases import Lease
from epdctl.transfer.onesided import OneSidedTransport
from epdctl.transfer.open import open_transport
from epdctl.transfer.pool import Pool
from epdctl.transfer.tensors import spec_of, spread
from epdctl.wire.config import ModelConfig, RankConfig, RankSpec, TransferConfig
from epdctl.wire.encode import ENCODER_TO_LANGUAGE, EmbeddingLanded
from epdctl.wire.sockets import Inbox, Link
from epdctl.wire.transfer import RemoteLease

__all__ = ["main"]

LEASE_SECONDS = 600.0
WRITE_SECONDS = 120.0
MASK = 2**63 - 1


def _spec(order: dict[str, Any], rank: str) -> RankSpec:
    name = RankName(rank)
    transfer = TransferConfig(backend=order["backend"], protocol=order["protocol"])
    config = RankConfig(
        rank=name,
        stage=name.stage,
        service="",
        model=ModelConfig(path="", name="", family=""),
        devices=[LocalGpu(0)] if order["gpu"] else [],
        transfer=transfer,
    )
    return RankSpec(
        run=RunId("bench"),
        cluster="bench",
        incarnation=Incarnation(1),
        token=order["token"],
        supervisor="",
        sockets=order["sockets"],
        config=config,
    )


def _device(order: dict[str, Any]) -> torch.device:
    return torch.device("cuda:0" if order["gpu"] else "cpu")


class Receiver:
    """Pools of every size, registered before the writer comes; sums what it is told has landed."""

    def __init__(self, order: dict[str, Any]) -> None:
        spec = _spec(order, "prefill/0")
        self._transport: Transport = open_transport(spec.config.transfer, spec)
        self._pools: dict[str, Pool] = {}
        self._leases: dict[str, Lease] = {}
        self._inbox: Inbox[EmbeddingLanded] = Inbox(
            f"ipc://{order['sockets']}/landed", ENCODER_TO_LANGUAGE, self._landed
        )
        self._device = _device(order)

    def open(self, sizes: list[int], page: int) -> dict[str, Any]:
        return {
            "note": self._transport.note,
            "notify": self._inbox.endpoint,
            "leases": [self._open(size, page) for size in sizes],
        }

    def _open(self, size: int, page: int) -> dict[str, Any]:
        """A pool and a lease on all of it; in pages that lie in no order, if it has pages."""
        began = time.perf_counter()
        memory = self._transport.allocate(size + page, self._device)
        allocated = time.perf_counter() - began
        pool = Pool(f"{size}", memory, RangeAllocator(size + page))
        began = time.perf_counter()
        address = self._transport.register(pool)
        seconds = allocated + time.perf_counter() - began
        piece = page or size
        extents = [extent for _ in range(-(-size // piece)) for extent in pool.allocator.take(piece)]
        random.Random(0).shuffle(extents)  # one extent stays where it is
        lease = pool.leases.grant(extents, "bench", seconds=LEASE_SECONDS)
        self._pools[pool.name], self._leases[pool.name] = pool, lease
        remote = json.loads(msgspec.json.encode(lease.remote(address), enc_hook=str))
        return {"register_us": seconds * 1e6, "lease": remote}

    def _landed(self, sender: bytes, message: EmbeddingLanded, _: list[memoryview]) -> None:
        """Every byte is read; the sum says so."""
        memory = self._pools[message.request].memory
        extents = self._leases[message.request].extents
        total = sum(_sum(memory[extent.offset : extent.offset + extent.nbytes]) for extent in extents)
        answer = msgspec.structs.replace(message, generation=total & MASK)
        self._inbox.reply(sender, answer, ENCODER_TO_LANGUAGE)

    async def close(self) -> None:
        self._inbox.close()
        await self._transport.close()


class Writer:
    """Writes from memory of its own, or in place where that can be, and times it."""

    def __init__(self, order: dict[str, Any]) -> None:
        spec = _spec(order, "encoder/0")
        self._transport: Transport = open_transport(spec.config.transfer, spec)
        self._device = _device(order)
        self._sum: asyncio.Future[int] | None = None
        self._link: Link[EmbeddingLanded, EmbeddingLanded] = Link(
            order["notify"], ENCODER_TO_LANGUAGE, ENCODER_TO_LANGUAGE, self._summed
        )

    def _summed(self, message: EmbeddingLanded, _: list[memoryview]) -> None:
        if self._sum is not None:
            self._sum.set_result(message.generation)

    async def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        lease = msgspec.convert(order["lease"], RemoteLease, dec_hook=lambda kind, value: kind(value))
        size, rounds = order["bytes"], order["rounds"]
        whole = self._transport.allocate(size, self._device) if order["pooled"] else _empty(size, self._device)
        data = whole.random_(0, 255)
        _done(self._device)
        if order["in_place"]:
            return {"seconds": [await self._hand_over(lease, data) for _ in range(rounds)], "moving": []}
        pieces = spread(data, lease.extents)
        await self._write(lease, pieces)
        if await self._have_summed(lease, data) != _sum(data) & MASK:
            raise TransferError("what arrived is not what was sent")
        seconds, summed, moving = [], [], []
        for _ in range(rounds):
            before = self._moving
            took, until_summed = await self._round(lease, pieces, data, order["sum"])
            seconds.append(took)
            summed.append(until_summed)
            moving.append(self._moving - before)
        return {"seconds": seconds, "summed": summed, "moving": moving if all(moving) else []}

    @property
    def _moving(self) -> float:
        """Seconds of moving so far, where the transport counts them."""
        return self._transport.moved.seconds if isinstance(self._transport, OneSidedTransport) else 0.0

    async def _round(
        self, lease: RemoteLease, pieces: list[Piece], data: torch.Tensor, with_sum: bool
    ) -> tuple[float, float]:
        began = time.perf_counter()
        await self._write(lease, pieces)
        written = time.perf_counter() - began
        if with_sum:
            await self._have_summed(lease, data)
        return written, time.perf_counter() - began

    async def _write(self, lease: RemoteLease, pieces: list[Piece]) -> None:
        await self._transport.write(lease, pieces, seconds=WRITE_SECONDS)

    async def _hand_over(self, lease: RemoteLease, data: torch.Tensor) -> float:
        """From the moment that the data is in its slot until the receiver may read it."""
        slot = await self._transport.open_slot(lease, seconds=WRITE_SECONDS)
        assert slot is not None, "this transport opens no slots"
        slot[: data.numel()].copy_(data)
        began = time.perf_counter()
        await self._write(lease, [Piece(slot[: data.numel()], 0)])
        return time.perf_counter() - began

    async def _have_summed(self, lease: RemoteLease, data: torch.Tensor) -> int:
        self._sum = asyncio.get_running_loop().create_future()
        said = EmbeddingLanded(
            request=RequestId(lease.pool.pool), attempt=0, index=0, lease=lease.lease, generation=0, spec=spec_of(data)
        )
        self._link.send(said)
        return await self._sum

    async def close(self) -> None:
        self._link.close()
        await self._transport.close()


def _sum(data: torch.Tensor) -> int:
    return int(data.view(torch.int64).sum())


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
                    answer = end.open(order["sizes"], order["page"]) | _facts()
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
