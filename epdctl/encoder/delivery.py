"""Takes embeddings to the ports of their readers, all at once, and waits until each has said that it has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from epdctl.encoder.orders import Destination
from epdctl.errors import PeerGone, RequestError
from epdctl.wire.deliver import (
    ENCODER_TO_READER,
    READER_TO_ENCODER,
    Embeddings,
    EncoderToReader,
    ReaderToEncoder,
    Unwanted,
)
from epdctl.wire.sockets import Link

__all__ = ["Parcel", "deliver"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parcel:
    message: Embeddings  # without a token
    rows: Sequence[memoryview]


async def deliver(parcel: Parcel, to: Destination, seconds: float) -> None:
    """Raises RequestError: 504 when a port does not take it in time, 502 when it does not want it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_attempt(parcel, endpoint, to.token, seconds)) for endpoint in to.endpoints]
    errors = [error for error in (task.result() for task in tasks) if error is not None]
    if errors:
        raise errors[0]


async def _attempt(parcel: Parcel, endpoint: str, token: str, seconds: float) -> RequestError | None:
    """One port's failure does not keep the others from being served."""
    try:
        async with asyncio.timeout(seconds):
            answer = await _hand_over(parcel, endpoint, token)
    except TimeoutError:
        return RequestError(504, f"{endpoint} did not take the embeddings within {seconds:.1f} s", code="deadline")
    except PeerGone as error:
        return RequestError(502, f"{endpoint} cannot be reached: {error.message}", code="unreachable")
    if isinstance(answer, Unwanted):
        return RequestError(502, f"{endpoint} did not want the embeddings: {answer.text}", code="unwanted")
    return None


async def _hand_over(parcel: Parcel, endpoint: str, token: str) -> ReaderToEncoder:
    answered: asyncio.Future[ReaderToEncoder] = asyncio.get_running_loop().create_future()
    message = msgspec.structs.replace(parcel.message, token=token)

    def answer(reply: ReaderToEncoder, _: Sequence[memoryview]) -> None:
        if reply.delivery == message.delivery and not answered.done():
            answered.set_result(reply)

    link: Link[ReaderToEncoder, EncoderToReader] = Link(endpoint, READER_TO_ENCODER, ENCODER_TO_READER, answer)
    try:
        link.send(message, parcel.rows)
        return await answered
    finally:
        link.close()
