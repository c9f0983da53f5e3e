"""How a rank comes up: its imports on a thread, and reports of loading that are not too many."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from epdctl.wire.lifecycle import Loading

__all__ = ["Loads", "in_thread"]

LOADING_SECONDS = 0.2  # between two reports of one phase: a report per tensor would flood the stream

T = TypeVar("T")


class Loads:
    """Thins out reports of loading: every phase, its end, and in between a few a second."""

    def __init__(self, post: Callable[[Loading], None]) -> None:
        self._post = post
        self._phase = ""
        self._at = 0.0

    def report(self, phase: str, done: int, total: int, now: float) -> None:
        if phase == self._phase and done < total and now - self._at < LOADING_SECONDS:
            return
        self._phase, self._at = phase, now
        self._post(Loading(phase=phase, done=done, total=total))


async def in_thread(work: Callable[[], T]) -> T:
    """Like asyncio.to_thread, on a thread that cannot keep the process from leaving."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def target() -> None:
        try:
            outcome: tuple[T | None, BaseException | None] = (work(), None)
        except BaseException as error:  # an import may raise anything; it is raised again where it is awaited
            outcome = (None, error)
        loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=target, name="imports", daemon=True).start()
    return await future
