"""Embeddings in an HTTP answer, as safetensors: sent piece by piece out of the memory they came in."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from epdctl.wire.transfer import TensorSpec

__all__ = ["Inline"]

log = logging.getLogger(__name__)

SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's name for a dtype → the format's
PIECE = 1 << 20  # bytes
PIECE_SECONDS = 30.0  # for the client to take one


class Inline(Response):
    """``over`` is called when the client has all of it, or is not going to: until then the rows are in use."""

    media_type = "application/octet-stream"

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        rows: Sequence[memoryview],
        metadata: Mapping[str, str],
        over: Callable[[], None],
    ) -> None:
        head = _header(specs, metadata)
        super().__init__(headers={"content-length": str(len(head) + sum(map(len, rows)))})
        self._parts = [memoryview(head), *rows]
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for piece in self._pieces():
                async with asyncio.timeout(PIECE_SECONDS):
                    await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:  # what is not complete is closed
            log.warning("a client took no more of its embeddings for %g s", PIECE_SECONDS)
        finally:
            self._over()

    def _pieces(self) -> Iterator[memoryview]:
        for part in self._parts:
            for start in range(0, len(part), PIECE):
                yield part[start : start + PIECE]


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The format is a length, a JSON header and the bytes; the library's writer has changed its arguments before."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for number, spec in enumerate(specs):
        offsets = [start, start + spec.nbytes]
        header[str(number)] = {"dtype": SAFETENSORS[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        start += spec.nbytes
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that the bytes behind it are aligned
    return len(text).to_bytes(8, "little") + text
