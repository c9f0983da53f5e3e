"""``/health_generate``: a real medium through router and rank and back, with its values checked."""

from __future__ import annotations

import asyncio
import math

import numpy

from epdctl.encoder.canary import BAND, Canary
from epdctl.encoder.jobs import Jobs
from epdctl.errors import RequestError
from epdctl.wire.transfer import TensorSpec

__all__ = ["Proof", "norm_of"]


class Proof:
    """Any number of askers share the one that is under way: a storm of probes is no load."""

    def __init__(self, jobs: Jobs, canary: Canary, seconds: float) -> None:
        self._jobs = jobs
        self._canary = canary
        self._seconds = seconds
        self._norm: float | None = None  # of the first that was right
        self._running: asyncio.Task[str | None] | None = None

    async def fault(self) -> str | None:
        """None: it was encoded in time, and rightly."""
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._try(), name="proof")
        return await asyncio.shield(self._running)

    async def _try(self) -> str | None:
        try:
            ends = asyncio.get_running_loop().time() + self._seconds
            job = self._jobs.start([(self._canary.item, self._canary.media)], self._seconds)
            try:
                (rows,), (spec,) = await job.embeddings(ends), await job.sizes(ends)
            finally:
                self._jobs.forget(job)
        except RequestError as error:
            return f"the test item was not encoded: {error.message}"
        return self._judged(norm_of(rows, spec))

    def _judged(self, norm: float) -> str | None:
        if not math.isfinite(norm) or norm == 0.0:
            return f"the test item's embedding has norm {norm}"
        if self._norm is None:
            self._norm = norm
        if abs(norm / self._norm - 1.0) <= BAND:
            return None
        return f"the test item's embedding has norm {norm:.6g}; the first one had {self._norm:.6g}"


def norm_of(rows: memoryview, spec: TensorSpec) -> float:
    """nan for a dtype that is none of the towers'."""
    match spec.dtype:
        case "float32" | "float16":
            values = numpy.frombuffer(rows, dtype=spec.dtype).astype(numpy.float64)
        case "bfloat16":  # the upper half of a float32
            upper = numpy.frombuffer(rows, dtype=numpy.uint16).astype(numpy.uint32) << 16
            values = upper.view(numpy.float32).astype(numpy.float64)
        case _:
            return math.nan
    return float(numpy.linalg.norm(values))
