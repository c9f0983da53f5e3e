"""Threads for what would hold up the loop: parsing, tokenising, reading headers of media."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from epdctl.gateway.budget import Ticket

__all__ = ["Aside"]

T = TypeVar("T")


class Aside:
    """Never more jobs than threads: whoever finds them all at work waits on the loop, and leaves at once when it is
    cancelled. A job that has begun goes on to its end, and its ticket stays out until then, whoever still waits."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="intake")
        self._free = asyncio.Semaphore(threads)

    async def run(self, work: Callable[[], T], ticket: Ticket | None = None) -> T:
        """What ``work`` returns or raises."""
        await self._free.acquire()
        job = asyncio.get_running_loop().run_in_executor(self._pool, work)
        if ticket is not None:
            ticket.keep()

        def ended(_: object) -> None:
            self._free.release()
            if ticket is not None:
                ticket.give_back()

        job.add_done_callback(ended)
        return await asyncio.shield(job)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
