"""A bell that tells any number of waiting tasks that something changed; what changed they read for themselves."""

from __future__ import annotations

import asyncio

__all__ = ["Bell"]


class Bell:
    """Rings are counted, so that one between looking and waiting is not missed, and many are heard as one."""

    def __init__(self) -> None:
        self.rings = 0
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        self.rings += 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, heard: int) -> int:
        """Return the count of rings once it is beyond ``heard``."""
        if self.rings <= heard:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
        return self.rings
