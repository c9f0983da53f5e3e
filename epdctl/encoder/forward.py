"""The vision tower at work: batches from whatever waits, one forward at a time, on the compute thread."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

import torch

from epdctl.encoder.batching import fitting
from epdctl.encoder.making import Refused
from epdctl.encoder.stream import DeviceStream
from epdctl.engine.api import Prepared, Tower
from epdctl.rank.compute import ComputeThread
from epdctl.rank.profile import Profiler
from epdctl.wire.encode import FailureKind

__all__ = ["Forward", "NotFinite"]


class NotFinite(Refused):
    """This item's embedding holds something that is no number; others of its batch may be fine."""

    def __init__(self, embedding: torch.Tensor) -> None:
        self.embedding = embedding
        super().__init__(FailureKind.INTERNAL, "its embedding is not finite: the tower made nan or infinity of it")


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
        self.made = 0  # items whose embeddings are finite …
        self.spoilt = 0  # … and those whose are not

    @property
    def waiting(self) -> int:
        """Items that no batch has taken."""
        return len(self._waiting)

    async def encode(self, prepared: Prepared, *, first: bool = False) -> torch.Tensor:
        """[rows, width]. Cancelling the wait takes the item out, unless its forward has begun. Raises NotFinite.

        ``first``: before all that wait.
        """
        result: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(_Waiting(prepared, result))
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
            for item, (embedding, finite) in zip(batch, embeddings, strict=True):
                self._settle(item, embedding, finite)

    def _settle(self, item: _Waiting, embedding: torch.Tensor, finite: bool) -> None:
        self.made += finite
        self.spoilt += not finite
        if item.result.done():
            return
        if finite:
            item.result.set_result(embedding)
        else:
            item.result.set_exception(NotFinite(embedding))

    def _next_batch(self) -> list[_Waiting]:
        """The front of the queue, without those that were cancelled."""
        self._waiting = deque(item for item in self._waiting if not item.result.done())
        count = fitting((item.prepared.patches for item in self._waiting), self._budget)
        return [self._waiting.popleft() for _ in range(count)]

    def _forward(self, batch: list[_Waiting]) -> list[tuple[torch.Tensor, bool]]:
        """With whether each is finite: a rank that always has work has little time for its canary."""

        def work() -> list[torch.Tensor]:
            embeddings = self._tower.encode([item.prepared for item in batch])
            return [*embeddings, _finite(embeddings)]

        *embeddings, finite = self._stream.run(work)
        self._profiler.step()
        return list(zip(embeddings, finite.tolist(), strict=True))


def _finite(embeddings: list[torch.Tensor]) -> torch.Tensor:
    """[items] bool, on their device: one nan or infinity makes a sum that is not finite, and no sum of ours overflows
    float32."""
    return torch.isfinite(torch.stack([embedding.sum(dtype=torch.float32) for embedding in embeddings]))
