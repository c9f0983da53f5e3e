"""What one HTTP request wants done with its embeddings: in the answer, to ports, or held until ``/send`` asks."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import Response
from fastapi.responses import JSONResponse

from epdctl.encoder.delivery import Parcel, deliver
from epdctl.encoder.inline import Inline
from epdctl.encoder.jobs import Job, Jobs
from epdctl.encoder.orders import Destination, EncodeBody, SendBody, target_of
from epdctl.errors import RequestError
from epdctl.rank.web import failure
from epdctl.wire.deliver import Embeddings
from epdctl.wire.encode import FailureKind, MediaItem
from epdctl.wire.transfer import TensorSpec

__all__ = ["Errands"]

WORD_SECONDS = 1.0  # beyond its budget: the router ends a request's items in time, and says why
REMEMBERED = 256  # parts that were held and failed, until somebody asks for them
Key = tuple[str, int]  # req_id, part_idx


@dataclass(slots=True)
class _Held:
    """Waits for ``/send``, at most until its request's deadline."""

    body: EncodeBody
    job: Job
    alarm: asyncio.TimerHandle
    answered: int = 0  # readers that got it in their answers
    served: set[tuple[str, ...]] = field(default_factory=set)  # … and the ports of those that were connected to

    @property
    def readers(self) -> int:
        return self.answered + len(self.served)


class Errands:
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._held: dict[Key, _Held] = {}
        self._coming: set[Key] = set()  # being sized
        self._failed: OrderedDict[Key, RequestError] = OrderedDict()  # held once: why there is nothing to send

    async def encode(
        self, body: EncodeBody, items: Sequence[tuple[MediaItem, bytes]], budget: float, *, anywhere: bool
    ) -> Response:
        """Raises RequestError."""
        to = target_of(body, anywhere=anywhere)
        if to is None:
            return await self._hold(body, items, budget)
        ends = asyncio.get_running_loop().time() + budget
        job = self._jobs.start(items, budget)
        try:
            await job.embeddings(ends + WORD_SECONDS)
            return await _hand_out(body, job, to, ends)
        finally:
            self._jobs.forget(job)

    async def _hold(self, body: EncodeBody, items: Sequence[tuple[MediaItem, bytes]], budget: float) -> Response:
        """Answers with the sizes, before the forward; the embeddings come meanwhile."""
        key = (body.req_id, body.part_idx)
        if key in self._held or key in self._coming:
            raise RequestError(409, f"part {body.part_idx} of {body.req_id} is held already", code="duplicate")
        self._failed.pop(key, None)
        self._coming.add(key)
        loop = asyncio.get_running_loop()
        ends = loop.time() + budget
        job = self._jobs.start(items, budget)
        try:
            specs = await job.sizes(ends + WORD_SECONDS)
        except BaseException:
            self._jobs.forget(job)
            raise
        finally:
            self._coming.discard(key)
        self._held[key] = _Held(body, job, loop.call_at(ends, self._late, key))
        job.failed = partial(self._fail, key)
        return JSONResponse(_sizes(body, job, specs))

    async def send(self, body: SendBody, budget: float, *, anywhere: bool) -> Response:
        """Raises RequestError: 404 for what is not held (any more), the job's own for what could not be made."""
        key = (body.req_id, body.part_idx)
        to = target_of(body, anywhere=anywhere)
        if to is None:
            raise RequestError(400, "deliver_to is missing", param="deliver_to")
        if (error := self._failed.pop(key, None)) is not None:
            raise error
        held = self._held.get(key)
        if held is None:
            raise RequestError(404, f"no embeddings of part {body.part_idx} of {body.req_id} are held", code="unknown")
        try:
            response = await _hand_out(held.body, held.job, to, asyncio.get_running_loop().time() + budget)
        except RequestError as error:
            if error is held.job.error:
                self._failed.pop(key, None)  # it has been heard
            raise
        if to.ports:
            held.served.add(tuple(to.endpoints))
        else:
            held.answered += 1
        if held.readers >= body.receive_count and self._held.get(key) is held:
            self._release(key)
        return response

    def _late(self, key: Key) -> None:
        text = f"part {key[1]} of {key[0]} was held until its request's time ended"
        self._release(key, failure(FailureKind.DEADLINE, text))

    def _fail(self, key: Key) -> None:
        """Its job has failed by itself: nothing is held any more, so that it may be asked for again."""
        held = self._held.get(key)
        if held is None or held.job.error is None:
            return
        self._failed[key] = held.job.error
        if len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)
        self._release(key)

    def _release(self, key: Key, why: RequestError | None = None) -> None:
        held = self._held.pop(key)
        held.alarm.cancel()
        self._jobs.forget(held.job, why)

    def close(self) -> None:
        for key in list(self._held):
            self._release(key)


async def _hand_out(body: EncodeBody, job: Job, to: Destination, ends: float) -> Response:
    rows = await job.embeddings(ends)
    specs = await job.sizes(ends)
    if not to.ports:
        return _inline(body, job, specs, rows)
    message = Embeddings(
        delivery=job.request,
        req_id=body.req_id,
        part_idx=body.part_idx,
        num_parts=body.num_parts,
        modality=body.kind,
        grids=[item.grid for item in job.items],
        specs=specs,
    )
    over = job.borrow()
    try:
        await deliver(Parcel(message, rows), to, max(0.0, ends - asyncio.get_running_loop().time()))
    finally:
        over()
    return JSONResponse(_sizes(body, job, specs))


def _sizes(body: EncodeBody, job: Job, specs: Sequence[TensorSpec]) -> dict[str, object]:
    items = [
        {"grid": item.grid, "rows": spec.shape[0], "nbytes": spec.nbytes}
        for item, spec in zip(job.items, specs, strict=True)
    ]
    return {
        "req_id": body.req_id,
        "part_idx": body.part_idx,
        "embedding_size": sum(spec.nbytes for spec in specs),
        "embedding_len": sum(spec.shape[0] for spec in specs),
        "embedding_dim": specs[0].shape[1],
        "dtype": specs[0].dtype,
        "items": items,
    }


def _inline(body: EncodeBody, job: Job, specs: Sequence[TensorSpec], rows: Sequence[memoryview]) -> Response:
    """One tensor for each item, called by its number; the grids are in the metadata."""
    metadata = {
        "req_id": body.req_id,
        "part_idx": str(body.part_idx),
        "num_parts": str(body.num_parts),
        "grids": json.dumps([item.grid for item in job.items]),
    }
    return Inline(specs, rows, metadata, job.borrow())
