"""``/health_generate``: a real medium through router and rank and back, and a proof of every rank that is open."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy

from epdctl.encoder.canary import BAND, Canary
from epdctl.encoder.dispatch import RankKey
from epdctl.encoder.jobs import Jobs
from epdctl.errors import RequestError
from epdctl.ids import RankName
from epdctl.wire.encode import FailureKind, ItemEncoded, Prove, Proved, Source
from epdctl.wire.transfer import TensorSpec

__all__ = ["BUSY", "FINE", "Outcome", "Prober", "norm_of"]

SLACK_SECONDS = 1.0  # beyond its own deadline, for a rank to say that it has passed
FINE, BUSY = "fine", "busy: real work took all the time, and got done"
CROWDED = frozenset(kind.value for kind in (FailureKind.FULL, FailureKind.DEADLINE))  # codes of errors


class _Fleet(Protocol):
    def open_ranks(self) -> Sequence[RankKey]: ...

    def tell(self, rank: RankKey, message: Prove) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """``encode``: FINE, BUSY, or what was wrong with an item that went the way of all items, and ``by`` which rank.
    ``ranks``: the same of each rank's own proof; ``faults`` are those of them that are faults."""

    encode: str
    by: RankName | None
    ranks: Mapping[RankName, str]

    @property
    def faults(self) -> dict[RankName, str]:
        return {rank: word for rank, word in self.ranks.items() if word not in (FINE, BUSY)}

    @property
    def broken(self) -> bool:
        """The way itself is, and not only a rank that is known to be unfit."""
        return self.encode not in (FINE, BUSY) and self.by not in self.faults


class Prober:
    """Any number of askers share the probe that is under way: a storm of probes is no load."""

    def __init__(self, fleet: _Fleet, jobs: Jobs, canary: Canary, seconds: float) -> None:
        self._fleet = fleet
        self._jobs = jobs
        self._canary = canary
        self._seconds = seconds
        self._norm: float | None = None  # of the first that was right
        self._made: Counter[RankName] = Counter()  # real embeddings, by who made them
        self._news = asyncio.Event()  # of those
        self._numbers = itertools.count(1)
        self._asked: dict[RankKey, tuple[int, asyncio.Future[Proved | None]]] = {}
        self._running: asyncio.Task[Outcome] | None = None

    def encoded(self, by: RankName, message: ItemEncoded) -> None:
        if message.source is Source.MADE:
            self._made[by] += 1
            self._news.set()

    def proved(self, by: RankKey, message: Proved) -> None:
        number, answer = self._asked.get(by, (0, None))
        if answer is not None and number == message.number and not answer.done():
            answer.set_result(message)

    def ranks_changed(self) -> None:
        """One that has left meanwhile says nothing any more."""
        there = set(self._fleet.open_ranks())
        for key, (_, answer) in self._asked.items():
            if key not in there and not answer.done():
                answer.set_result(None)

    async def outcome(self) -> Outcome:
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._probe(), name="probe")
        return await asyncio.shield(self._running)

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _probe(self) -> Outcome:
        before = Counter(self._made)
        keys = self._fleet.open_ranks()
        proving = asyncio.gather(*(self._prove(key, before) for key in keys))
        (encode, by), words = await asyncio.gather(self._encode(before), proving)
        ranks = {key.rank: word for key, word in zip(keys, words, strict=True) if word is not None}
        return Outcome(encode, by, ranks)

    async def _encode(self, before: Mapping[RankName, int]) -> tuple[str, RankName | None]:
        ends = asyncio.get_running_loop().time() + self._seconds + SLACK_SECONDS
        try:
            job = self._jobs.start([(self._canary.item, self._canary.media)], self._seconds)
            try:
                (rows,), (spec,) = await job.embeddings(ends), await job.sizes(ends)
            finally:
                self._jobs.forget(job)
        except RequestError as error:
            if error.code in CROWDED and await self._gets_on(before, ends):
                return BUSY, None
            return f"the test item was not encoded: {error.message}", None
        return self._judged(norm_of(rows, spec)), job.by

    async def _gets_on(self, before: Mapping[RankName, int], ends: float) -> bool:
        """Whether anything is made by then: it may be that nothing was in the moment until the item was refused."""
        try:
            async with asyncio.timeout_at(ends):
                while self._made == before:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    def _judged(self, norm: float) -> str:
        if not math.isfinite(norm) or norm == 0.0:
            return f"the test item's embedding has norm {norm}"
        if self._norm is None:
            self._norm = norm
        if abs(norm / self._norm - 1.0) <= BAND:
            return FINE
        return f"the test item's embedding has norm {norm:.6g}; the first one had {self._norm:.6g}"

    async def _prove(self, key: RankKey, before: Mapping[RankName, int]) -> str | None:
        """The rank's word; None when it has left."""
        answer: asyncio.Future[Proved | None] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        self._asked[key] = number, answer
        self._fleet.tell(key, Prove(number=number))
        try:
            async with asyncio.timeout(self._seconds + SLACK_SECONDS):
                proved = await answer
        except TimeoutError:
            busy = self._made[key.rank] != before.get(key.rank, 0)
            return BUSY if busy else f"asked to prove itself, it did not answer within {self._seconds:g} s"
        finally:
            del self._asked[key]
        if proved is None:
            return None
        return BUSY if proved.busy else proved.fault or FINE


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
