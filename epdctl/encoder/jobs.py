"""The items of requests that came over HTTP, on their way through the router: a client of its inbox like any other."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import assert_never

from epdctl.errors import PeerGone, RequestError
from epdctl.ids import RankName, RequestId
from epdctl.rank.web import encode_failure, failure
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ROUTER_TO_CLIENT,
    CancelEncode,
    ClientToRouter,
    Encode,
    Encoded,
    EncodeFailed,
    FailureKind,
    MediaItem,
    RouterToClient,
    Sized,
)
from epdctl.wire.sockets import Link
from epdctl.wire.transfer import TensorSpec

__all__ = ["Account", "Job", "Jobs"]

log = logging.getLogger(__name__)

ATTEMPT = 1  # an id of ours for every job, so that two requests with one req_id have nothing in common


class Account:
    """Bytes of embeddings that are here, or have been told to come, of every job together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, nbytes: int) -> bool:
        """False when there is no room for so many more."""
        if self.held + nbytes > self.limit:
            return False
        self.held += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        self.held -= nbytes


class Job:
    """The items of one request: first their sizes, then their embeddings; or the error that ended all of them.

    It holds its embeddings' bytes of the ``account`` from the moment they are sized until it has failed, or is released
    and nobody borrows them.
    ``failed`` is called once, if that is how it ends.
    """

    def __init__(self, request: RequestId, items: Sequence[MediaItem], account: Account) -> None:
        self.request = request
        self.items = items
        self.error: RequestError | None = None
        self.by: RankName | None = None  # who made the last of them
        self.failed: Callable[[], None] = _nobody
        self._account = account
        self._held = 0
        self._borrowers = 0
        self._released = False
        self._specs: dict[int, TensorSpec] = {}
        self._rows: dict[int, memoryview] = {}
        self._changed = asyncio.Event()

    @property
    def complete(self) -> bool:
        return len(self._rows) == len(self.items)

    async def sizes(self, ends: float) -> list[TensorSpec]:
        """``ends``: on the loop's clock. Raises RequestError."""
        await self._until(self._specs, ends)
        return [self._specs[item.index] for item in self.items]

    async def embeddings(self, ends: float) -> list[memoryview]:
        """The bytes of each item's rows. Raises RequestError."""
        await self._until(self._rows, ends)
        return [self._rows[item.index] for item in self.items]

    async def _until(self, told: dict[int, TensorSpec] | dict[int, memoryview], ends: float) -> None:
        try:
            async with asyncio.timeout_at(ends):
                while self.error is None and len(told) < len(self.items):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            text = f"{len(told)} of {len(self.items)} items were there when the request's time ended"
            raise failure(FailureKind.DEADLINE, text) from error
        if self.error is not None:
            raise self.error

    def hear(self, message: RouterToClient, frames: Sequence[memoryview]) -> None:
        if self.error is not None:
            return
        match message:
            case Sized(index=index, spec=spec):
                self._sized(index, spec)
            case Encoded(index=index, spec=TensorSpec() as spec) if len(frames) == 1 and len(frames[0]) == spec.nbytes:
                if self._sized(index, spec):
                    self._rows[index] = frames[0]
                    self.by = message.by
            case Encoded(by=by):
                self.fail(failure(FailureKind.INTERNAL, f"{by} sent no embedding"))
            case EncodeFailed(index=index):
                self.fail(encode_failure(message, f"mm_items[{index}]"))
            case _:
                assert_never(message)
        self._changed.set()

    def _sized(self, index: int, spec: TensorSpec) -> bool:
        """Said again when the item goes to another rank."""
        known = self._specs.get(index)
        more = spec.nbytes - (0 if known is None else known.nbytes)
        if not self._account.take(more):
            limit = self._account.limit
            kind = FailureKind.TOO_LARGE if self._held + more > limit else FailureKind.FULL
            self.fail(failure(kind, f"{self._account.held} of {limit} bytes of embeddings are taken; {more} more came"))
            return False
        self._held += more
        self._specs[index] = spec
        return True

    def fail(self, error: RequestError) -> None:
        """Whoever waits for it is told; it means nothing to a job that is complete."""
        if self.error is not None or self.complete:
            return
        self.error = error
        self.release()
        self._changed.set()
        self.failed()

    def release(self) -> None:
        """Its bytes are nobody's any more, once those who borrow them have let go."""
        self._released = True
        if not self._borrowers:
            self._account.give_back(self._held)
            self._held = 0

    def borrow(self) -> Callable[[], None]:
        """Its embeddings are being handed out, until what is returned is called."""
        self._borrowers += 1
        return self._let_go

    def _let_go(self) -> None:
        self._borrowers -= 1
        if self._released:
            self.release()


def _nobody() -> None:
    """Nobody needs to know."""


class Jobs:
    """Every job whose request is still here. ``limit``: bytes of their embeddings together."""

    def __init__(self, inbox: str, limit: int) -> None:
        self.account = Account(limit)
        self._jobs: dict[RequestId, Job] = {}
        self._link: Link[RouterToClient, ClientToRouter] = Link(
            inbox, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, self._answered
        )

    def __len__(self) -> int:
        return len(self._jobs)

    def start(self, items: Sequence[tuple[MediaItem, bytes]], budget: float) -> Job:
        """Raises RequestError (429) when the router does not even read."""
        request = RequestId(f"http-{secrets.token_hex(12)}")
        job = self._jobs[request] = Job(request, [item for item, _ in items], self.account)
        try:
            for item, media in items:
                message = Encode(request=request, attempt=ATTEMPT, item=item, slot=None, notify="", budget_s=budget)
                self._link.send(message, [media])
        except PeerGone as error:
            self.forget(job)
            raise failure(FailureKind.FULL, error.message) from error
        return job

    def forget(self, job: Job, why: RequestError | None = None) -> None:
        """Cancels what of it is still under way; whoever still waits for it is told ``why``."""
        known = self._jobs.pop(job.request, None) is not None
        if known and not job.complete and not self._link.closed:
            self._cancel(job)
        job.fail(why or failure(FailureKind.RANK_LOST, "the request was given up"))
        job.release()

    def _cancel(self, job: Job) -> None:
        try:
            self._link.send(CancelEncode(request=job.request, attempt=ATTEMPT))
        except PeerGone as error:  # its items end with their budgets
            log.warning("the router did not hear that %s was given up: %s", job.request, error)

    def _answered(self, message: RouterToClient, frames: list[memoryview]) -> None:
        if (job := self._jobs.get(message.request)) is not None:
            job.hear(message, frames)

    def close(self) -> None:
        for job in list(self._jobs.values()):
            self.forget(job, failure(FailureKind.RANK_LOST, "the encoder is being stopped"))
        self._link.close()
