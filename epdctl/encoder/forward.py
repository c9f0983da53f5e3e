"""The vision tower at work: batches from whatever waits, one forward at a time, on the compute thread."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

import torch

from epdctl.encoder.batching import fitting
from epdctl.encoder.stream import DeviceStream
from epdctl.engine.api import Prepared, Tower
from epdctl.rank.compute import ComputeThread
from epdctl.rank.profile import Profiler

__all__ = ["Forward"]


class _Waiting(NamedTuple):
    prepared: Prepared
    result: asyncio.Future[torch.Tensor]


class Forward:
    """Takes prepared items of any request; ``run`` is the one loop that feeds the tower.

    What waits is bounded by the rank's items in flight. An error of the tower leaves ``run``, and so ends the rank:
    after a failed kernel nothing on the device can be trusted.
    """

    def __init__(self, tower: Tower, compute: ComputeThread, profiler: Profiler, budget: int) -> None:
        self._tower = tower
        self._compute = compute
        self._profiler = profiler
        self._budget = budget
        self._waiting: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._stream = DeviceStream()
        self.batches = 0
        self.made = 0  # items

    @property
    def waiting(self) -> int:
        """Items that no batch has taken."""
        return len(self._waiting)

    async def encode(self, prepared: Prepared) -> torch.Tensor:
        """[rows, width]. Cancelling the wait takes the item out, unless its forward has begun."""
        result: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(prepared, result))
        self._wake.set()
        return await result

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            batch = self._next_batch()
            if not batch:
                self._wake.clear()
                continue
            embeddings = await self._compute.run(lambda batch=batch: self._forward(batch))  # type: ignore[misc]
            self.batches += 1
            self.made += len(batch)
            for item, embedding in zip(batch, embeddings, strict=True):
                if not item.result.done():
                    item.result.set_result(embedding)

    def _next_batch(self) -> list[_Waiting]:
        """The front of the queue, without those that were cancelled."""
        self._waiting = deque(item for item in self._waiting if not item.result.done())
        count = fitting((item.prepared.patches for item in self._waiting), self._budget)
        return [self._waiting.popleft() for _ in range(count)]

    def _forward(self, batch: list[_Waiting]) -> list[torch.Tensor]:
        embeddings = self._stream.run(lambda: self._tower.encode([item.prepared for item in batch]))
        self._profiler.step()
        return embeddings
