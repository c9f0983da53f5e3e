"""The one thread that runs the model, so that the event loop never waits for a forward."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["ComputeThread"]

T = TypeVar("T")
MAX_JOBS = 1024  # a worker has one step under way and a few small jobs behind it; more is a mistake in the worker


class ComputeThread:
    """Runs jobs one after another, in the order they were given, and hands results to the loop it was made on.

    A job given with ``run`` fails into its awaiter; one given with ``post``, or whose awaiter is gone, fails into the
    loop's exception handler, which ends the rank: a step that failed unseen would be a rank that stands still.
    """

    def __init__(self, name: str = "compute") -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_JOBS)
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        self._since: float | None = None  # when the job under way began; written by the thread alone
        # A daemon thread: a forward that hangs must not keep a process alive that was told to leave.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def job_seconds(self) -> float:
        """How long the job under way has run; 0 between two jobs. A kernel that hangs is seen here."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    async def run(self, job: Callable[[], T]) -> T:
        """The result of ``job``, or its exception. Cancelling the wait lets the job run to its end."""
        future: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T) -> None:
            if not future.done():
                future.set_result(result)

        def fail(error: BaseException) -> None:
            if future.done():
                raise error
            future.set_exception(error)

        self._put(job, settle, fail)
        return await future

    def post(self, job: Callable[[], T], done: Callable[[T], None] | None = None) -> None:
        """Run ``job`` without waiting; ``done(result)`` runs on the loop. Callable from the loop only."""

        def settle(result: T) -> None:
            if done is not None:
                done(result)

        def fail(error: BaseException) -> None:
            raise error

        self._put(job, settle, fail)

    def _put(self, job: Callable[[], T], settle: Callable[[T], None], fail: Callable[[BaseException], None]) -> None:
        if self._closed:
            raise RuntimeError(f"the {self._thread.name} thread was closed")

        def run() -> None:
            try:
                result = job()
            except BaseException as error:  # every end of a job is told on the loop, SystemExit included
                self._tell(fail, error)
            else:
                self._tell(settle, result)

        self._jobs.put_nowait(run)

    def _tell(self, callback: Callable[[T], None], value: T) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, value)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._since = time.monotonic()
            job()
            self._since = None
        self._tell(self._settle_end, None)

    def _settle_end(self, _: None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    async def close(self, *, seconds: float = 5.0) -> bool:
        """Let the jobs already given finish; False when they did not within ``seconds``."""
        if not self._closed:
            self._closed = True
            self._jobs.put_nowait(None)
        done, _ = await asyncio.wait([self._ended], timeout=seconds)
        return bool(done)
