"""The items of requests that came over HTTP, on their way through the router: a client of its inbox like any other."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import assert_never

from epdctl.errors import PeerGone, RequestError
from epdctl.ids import RequestId
from epdctl.rank.web import failure
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

__all__ = ["Job", "Jobs"]

ATTEMPT = 1  # an id of ours for every job, so that two requests with one req_id have nothing in common


class Job:
    """The items of one request: first their sizes, then their embeddings; or the error that ended all of them."""

    def __init__(self, request: RequestId, items: Sequence[MediaItem]) -> None:
        self.request = request
        self.items = items
        self._specs: dict[int, TensorSpec] = {}
        self._rows: dict[int, memoryview] = {}
        self._error: RequestError | None = None
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._error is not None or len(self._rows) == len(self.items)

    async def sizes(self) -> list[TensorSpec]:
        """Raises RequestError."""
        await self._until(self._specs)
        return [self._specs[item.index] for item in self.items]

    async def embeddings(self) -> list[memoryview]:
        """The bytes of each item's rows. Raises RequestError."""
        await self._until(self._rows)
        return [self._rows[item.index] for item in self.items]

    async def _until(self, told: dict[int, TensorSpec] | dict[int, memoryview]) -> None:
        while len(told) < len(self.items):
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()

    def hear(self, message: RouterToClient, frames: Sequence[memoryview]) -> None:
        match message:
            case Sized(index=index, spec=spec):
                self._specs[index] = spec
            case Encoded(index=index, spec=TensorSpec() as spec) if len(frames) == 1 and len(frames[0]) == spec.nbytes:
                self._specs[index] = spec
                self._rows[index] = frames[0]
            case Encoded(by=by):
                self._error = self._error or failure(FailureKind.INTERNAL, f"{by} sent no embedding")
            case EncodeFailed(kind=kind, text=text):
                self._error = self._error or failure(kind, text)
            case _:
                assert_never(message)
        self._changed.set()


class Jobs:
    """Every job whose request is still here."""

    def __init__(self, inbox: str) -> None:
        self._jobs: dict[RequestId, Job] = {}
        self._link: Link[RouterToClient, ClientToRouter] = Link(
            inbox, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, self._answered
        )

    def __len__(self) -> int:
        return len(self._jobs)

    def start(self, items: Sequence[tuple[MediaItem, bytes]], budget: float) -> Job:
        """Raises RequestError (429) when the router does not even read."""
        request = RequestId(f"http-{secrets.token_hex(12)}")
        job = self._jobs[request] = Job(request, [item for item, _ in items])
        try:
            for item, media in items:
                message = Encode(request=request, attempt=ATTEMPT, item=item, slot=None, notify="", budget_s=budget)
                self._link.send(message, [media])
        except PeerGone as error:
            self.forget(job)
            raise failure(FailureKind.FULL, error.message) from error
        return job

    def forget(self, job: Job) -> None:
        """Cancels what of it is still under way."""
        if self._jobs.pop(job.request, None) is None or job.ended or self._link.closed:
            return
        self._link.send(CancelEncode(request=job.request, attempt=ATTEMPT))

    def _answered(self, message: RouterToClient, frames: list[memoryview]) -> None:
        if (job := self._jobs.get(message.request)) is not None:
            job.hear(message, frames)

    def close(self) -> None:
        self._link.close()
        self._jobs.clear()
