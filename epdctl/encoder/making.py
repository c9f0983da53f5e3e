"""How an item becomes an embedding: remembered, shared with an identical one in flight, or made.

open ──► remembered?  ──► both futures are done
     ├─► in flight?   ──► its futures; whoever leaves last cancels the work
     └─► a new Making ──► room → prepare (threads) → size → forward → embedding → the cache
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from epdctl.encoder.cache import Cache, EmbeddingKey, key_of
from epdctl.encoder.room import Room
from epdctl.engine.api import Prepared
from epdctl.errors import EpdError
from epdctl.rank.tasks import Tasks
from epdctl.wire.config import EncoderConfig
from epdctl.wire.encode import FailureKind, MediaItem, Source

__all__ = ["Makings", "Reading", "Refused", "Size"]


class Refused(EpdError):
    """This item ends here, and ``kind`` says why."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Size(NamedTuple):
    grid: tuple[int, int, int]
    rows: int


@dataclass(slots=True)
class _Making:
    """Owned by its readers; the futures are theirs to await, shielded."""

    size: asyncio.Future[Size] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    embedding: asyncio.Future[torch.Tensor] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    task: asyncio.Task[None] | None = None
    readers: int = 0

    def fail(self, error: Refused) -> None:
        for future in (self.size, self.embedding):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: a reader may have left


@dataclass(frozen=True, slots=True)
class Reading:
    """One item's share in a making. Raises Refused where the item is refused."""

    making: _Making
    source: Source

    async def size(self) -> Size:
        return await asyncio.shield(self.making.size)

    async def embedding(self) -> torch.Tensor:
        """[rows, width]; others may hold the same tensor, so it is never written to."""
        return await asyncio.shield(self.making.embedding)


class Makings:
    """``prepare`` raises Refused; whatever else it or ``encode`` raises ends the rank, by way of ``tasks``."""

    def __init__(
        self,
        prepare: Callable[[memoryview, MediaItem], Awaitable[Prepared]],
        encode: Callable[[Prepared], Awaitable[torch.Tensor]],
        tasks: Tasks,
        config: EncoderConfig,
    ) -> None:
        self._prepare = prepare
        self._encode = encode
        self._tasks = tasks
        self.cache: Cache[tuple[Size, torch.Tensor]] = Cache(config.cache_bytes)
        self.room = Room(config.prepared_bytes)
        self.counts = dict.fromkeys(Source, 0)  # of readings, by where their embeddings come from
        self._flights: dict[EmbeddingKey, _Making] = {}

    @contextlib.contextmanager
    def open(self, media: memoryview, item: MediaItem) -> Iterator[Reading]:
        """What it takes to make it goes on until every reader has left."""
        reading = self._find(media, item)
        self.counts[reading.source] += 1
        making = reading.making
        making.readers += 1
        try:
            yield reading
        finally:
            making.readers -= 1
            if making.readers == 0 and making.task is not None:
                making.task.cancel()  # means nothing when it is done

    def _find(self, media: memoryview, item: MediaItem) -> Reading:
        key = key_of(item) if self.cache.limit else None
        if key is None:
            return Reading(self._start(None, media, item), Source.MADE)
        if (kept := self.cache.get(key)) is not None:
            making = _Making()
            making.size.set_result(kept[0])
            making.embedding.set_result(kept[1])
            return Reading(making, Source.CACHED)
        flight = self._flights.get(key)
        if flight is not None and flight.readers:  # without readers it has been cancelled
            return Reading(flight, Source.SHARED)
        making = self._flights[key] = self._start(key, media, item)
        return Reading(making, Source.MADE)

    def _start(self, key: EmbeddingKey | None, media: memoryview, item: MediaItem) -> _Making:
        making = _Making()
        making.task = self._tasks.start(self._make(making, key, media, item), f"making item {item.index}")
        return making

    async def _make(self, making: _Making, key: EmbeddingKey | None, media: memoryview, item: MediaItem) -> None:
        try:
            async with self.room.hold(item) as took:
                prepared = await self._prepare(media, item)
                took(prepared.pixels.nbytes)
                size = Size(prepared.grid, prepared.rows)
                making.size.set_result(size)
                embedding = await self._encode(prepared)
                del prepared
            if key is not None:
                embedding = _alone(embedding)
                self.cache.put(key, (size, embedding), embedding.nbytes)
            making.embedding.set_result(embedding)
        except Refused as error:
            making.fail(error)
        finally:
            if key is not None and self._flights.get(key) is making:
                del self._flights[key]


def _alone(embedding: torch.Tensor) -> torch.Tensor:
    """Memory of its own: a view of a whole batch would keep all of it."""
    return embedding if embedding.untyped_storage().nbytes() == embedding.nbytes else embedding.clone()
