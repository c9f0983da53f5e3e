"""Readiness, proved: a small medium of our own goes the way of every item, and the values that come are checked."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from epdctl.errors import EpdError
from epdctl.families import open_family
from epdctl.families.base import Family
from epdctl.families.samples import SAMPLES
from epdctl.rank.headers import read_header
from epdctl.rank.service import Proof
from epdctl.wire.config import EncoderConfig, Limits, ModelConfig
from epdctl.wire.encode import MediaItem

__all__ = ["BAND", "Canary", "Watch", "family_canary", "model_canary"]

log = logging.getLogger(__name__)

MOST_LEFT_OUT = 5  # times in a row that real work takes the canary's place
BAND = 0.05  # how far the norm may be from the first one, as a part of it: batches change 16-bit numbers a little


@dataclass(frozen=True, slots=True)
class Canary:
    """``item`` has no hash: what is remembered proves nothing."""

    media: bytes
    item: MediaItem


def model_canary(model: ModelConfig) -> Canary:
    """Of the first modality that the model takes. Raises LoadError for a checkpoint without its json files."""
    return family_canary(open_family(Path(model.path)))


def family_canary(family: Family) -> Canary:
    modality = family.modalities[0]
    media = SAMPLES[modality]
    span = family.span(read_header(modality, media, Limits()), 1)
    item = MediaItem(index=0, modality=modality, content_hash="", of=1, grid=list(span.grid), rows=span.rows)
    return Canary(media, item)


class Watch:
    """``measure`` encodes the canary and returns the norm of what came; ``made`` counts the items encoded so far.

    The canary is left out only while ``made`` advances: work that merely waits proves nothing, and a rank that is slow
    because it is busy is not sick. Nor is it left out for long: values that are finite, as those of ``made`` are, may
    be wrong. ``spoilt`` counts the items whose embeddings were not finite: after such a one it is never left out.
    """

    def __init__(
        self,
        measure: Callable[[], Awaitable[float]],
        made: Callable[[], int],
        config: EncoderConfig,
        *,
        spoilt: Callable[[], int] = lambda: 0,
    ) -> None:
        self.reason: str | None = None  # why the rank is unhealthy
        self._measure = measure
        self._made = made
        self._spoilt = spoilt
        self._spoilt_before = 0
        self._left_out = 0  # times in a row
        self._every = config.canary_seconds
        self._deadline = config.canary_deadline
        self._norm = math.nan
        self._seen = 0

    async def calibrate(self) -> None:
        """The first encode of this process: what the later ones are held against. Raises EpdError."""
        self._norm = await self._measure()
        self._seen, self._spoilt_before = self._made(), self._spoilt()
        if not math.isfinite(self._norm) or self._norm == 0.0:
            raise EpdError(
                f"the tower made an embedding of norm {self._norm} of the test item",
                hint="the checkpoint's weights, or the device's memory, are damaged",
            )

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            await self.check()

    async def check(self) -> None:
        made = self._made()
        proved = made != self._seen and self._spoilt() == self._spoilt_before
        if self.reason is None and proved and self._left_out < MOST_LEFT_OUT:
            self._seen = made
            self._left_out += 1
            return
        await self.prove()

    async def prove(self) -> Proof:
        """Now, whatever else gets done. What it finds is the rank's ``reason``; a canary that is right mends it."""
        spoilt = self._spoilt() - self._spoilt_before
        proof = await self._examine(self._made())
        if spoilt:
            log.warning("%d embeddings were not finite", spoilt)
        if proof.fault is not None and spoilt:
            proof = Proof(f"{proof.fault}; {spoilt} embeddings before it were not finite")
        if proof.fault is not None and self.reason is None:
            log.error("this rank is not fit to serve: %s", proof.fault)
        if not proof.busy:
            self.reason = proof.fault
        self._seen, self._spoilt_before, self._left_out = self._made(), self._spoilt(), 0
        return proof

    async def _examine(self, before: int) -> Proof:
        try:
            async with asyncio.timeout(self._deadline):
                norm = await self._measure()
        except TimeoutError:
            busy = self._made() != before
            return Proof(None if busy else f"the test item was not encoded within {self._deadline:g} s", busy)
        except EpdError as error:
            return Proof(f"the test item was refused: {error.message}")
        if abs(norm / self._norm - 1.0) <= BAND:  # false for nan too
            return Proof()
        return Proof(f"the test item's embedding has norm {norm:.6g}; at the start it was {self._norm:.6g}")
