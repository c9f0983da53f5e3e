"""The baseline's client: plain sockets of asyncio's, and a table of who waits for which number."""

from __future__ import annotations

import asyncio

import zmq
import zmq.asyncio

__all__ = ["PlainClient"]


class PlainClient:
    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self._number = 0
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        while True:
            (number,) = await self._socket.recv_multipart(copy=False)
            self._waiting.pop(number.bytes).set_result(None)

    async def item(self, media: bytes) -> None:
        self._number += 1
        number = self._number.to_bytes(8, "big")
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_multipart([number, media], copy=False)
        await future

    def close(self) -> None:
        self._reader.cancel()
        self._socket.close(linger=0)
