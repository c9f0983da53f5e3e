"""A reader of the encoder's deliveries, for whoever runs the encoder behind an engine of their own.

    async with Reader("127.0.0.1", 9000) as reader:
        ...  # POST /encode with {"deliver_to": "caller", "embedding_port": 9000, "req_id": "a", ...}
        part = await reader.part("a", seconds=30)

Free of torch: ``torch.frombuffer(item.rows, dtype=torch.bfloat16).view(item.shape)`` makes a tensor without a copy.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from epdctl.errors import DeadlineExceeded, PeerGone
from epdctl.wire.deliver import (
    ENCODER_TO_READER,
    READER_TO_ENCODER,
    Embeddings,
    EncoderToReader,
    ReaderToEncoder,
    Received,
    Unwanted,
)
from epdctl.wire.sockets import Inbox, Sender

__all__ = ["Embedded", "Part", "Reader"]

log = logging.getLogger(__name__)

MAX_PARTS = 4096  # that nobody has asked for yet; beyond it deliveries are turned away
MAX_BYTES = 1 << 30  # of those parts together
REMEMBERED = 4096  # deliveries that were taken


@dataclass(frozen=True, slots=True)
class Embedded:
    """One item: ``rows`` are ``shape`` values of ``dtype`` (torch's name for it), row after row."""

    grid: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    rows: memoryview


@dataclass(frozen=True, slots=True)
class Part:
    req_id: str
    part_idx: int
    num_parts: int
    items: Sequence[Embedded]

    @property
    def nbytes(self) -> int:
        return sum(len(item.rows) for item in self.items)


class Reader:
    """Listens at one port; made and used inside one event loop. ``token``: what deliveries must show; ``max_bytes``: of
    the parts together that nobody has asked for yet.

    Raises OSError when the port cannot be bound.
    """

    def __init__(self, host: str, port: int, *, token: str = "", max_bytes: int = MAX_BYTES) -> None:
        self._token = token
        self._max_bytes = max_bytes
        self._bytes = 0
        self._taken: OrderedDict[str, None] = OrderedDict()
        self._parts: dict[tuple[str, int], Part] = {}
        self._arrived = asyncio.Event()
        self._inbox: Inbox[EncoderToReader] = Inbox(f"tcp://{host}:{port}", ENCODER_TO_READER, self._received)

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def part(self, req_id: str, part_idx: int = 0, *, seconds: float) -> Part:
        """Each part once. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout(seconds):
                while (req_id, part_idx) not in self._parts:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(f"part {part_idx} of {req_id} did not come within {seconds:g} s") from error
        part = self._parts.pop((req_id, part_idx))
        self._bytes -= part.nbytes
        return part

    def _received(self, sender: Sender, message: Embeddings, frames: list[memoryview]) -> None:
        fault = self._fault(message, frames)
        if fault is None:
            self._take(message, frames)
            self._answer(sender, Received(delivery=message.delivery))
        else:
            log.warning("turned a delivery away: %s", fault)
            self._answer(sender, Unwanted(delivery=message.delivery, text=fault))

    def _take(self, message: Embeddings, frames: Sequence[memoryview]) -> None:
        """What was taken before comes again when our answer was lost."""
        if message.delivery in self._taken:
            return
        part = self._parts[message.req_id, message.part_idx] = _part(message, frames)
        self._bytes += part.nbytes
        self._taken[message.delivery] = None
        if len(self._taken) > REMEMBERED:
            self._taken.popitem(last=False)
        self._arrived.set()

    def _fault(self, message: Embeddings, frames: Sequence[memoryview]) -> str | None:
        if not hmac.compare_digest(message.token.encode(), self._token.encode()):
            return "wrong token"
        if [len(frame) for frame in frames] != [spec.nbytes for spec in message.specs]:
            return "the frames are not as long as their specs say"
        if len(message.grids) != len(message.specs):
            return "grids and specs are of different numbers"
        return None if message.delivery in self._taken else self._crowd(message)

    def _crowd(self, message: Embeddings) -> str | None:
        if (message.req_id, message.part_idx) in self._parts:
            return f"another part {message.part_idx} of {message.req_id} waits to be read"
        if len(self._parts) >= MAX_PARTS:
            return f"{MAX_PARTS} parts wait to be read"
        more = sum(spec.nbytes for spec in message.specs)
        if self._bytes + more > self._max_bytes:
            return f"{self._bytes} of at most {self._max_bytes} bytes wait to be read; {more} more came"
        return None

    def _answer(self, sender: Sender, message: ReaderToEncoder) -> None:
        try:
            self._inbox.reply(sender, message, READER_TO_ENCODER)
        except PeerGone as error:
            log.info("an encoder left before its answer: %s", error)

    def close(self) -> None:
        self._inbox.close()


def _part(message: Embeddings, frames: Sequence[memoryview]) -> Part:
    items = [
        Embedded(grid=tuple(grid), dtype=spec.dtype, shape=tuple(spec.shape), rows=frame)
        for grid, spec, frame in zip(message.grids, message.specs, frames, strict=True)
    ]
    return Part(message.req_id, message.part_idx, message.num_parts, items)
