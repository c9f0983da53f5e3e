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


class Reader:
    """Listens at one port; made and used inside one event loop. ``token``: what deliveries must show.

    Raises OSError when the port cannot be bound.
    """

    def __init__(self, host: str, port: int, *, token: str = "") -> None:
        self._token = token
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
        return self._parts.pop((req_id, part_idx))

    def _received(self, sender: Sender, message: Embeddings, frames: list[memoryview]) -> None:
        fault = self._fault(message, frames)
        if fault is None:
            self._parts[message.req_id, message.part_idx] = _part(message, frames)
            self._arrived.set()
            self._answer(sender, Received(delivery=message.delivery))
        else:
            log.warning("turned a delivery away: %s", fault)
            self._answer(sender, Unwanted(delivery=message.delivery, text=fault))

    def _fault(self, message: Embeddings, frames: Sequence[memoryview]) -> str | None:
        if not hmac.compare_digest(message.token.encode(), self._token.encode()):
            return "wrong token"
        if [len(frame) for frame in frames] != [spec.nbytes for spec in message.specs]:
            return "the frames are not as long as their specs say"
        if len(message.grids) != len(message.specs):
            return "grids and specs are of different numbers"
        if (message.req_id, message.part_idx) in self._parts:
            return f"part {message.part_idx} of {message.req_id} is here already"
        return f"{MAX_PARTS} parts wait to be read" if len(self._parts) >= MAX_PARTS else None

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
