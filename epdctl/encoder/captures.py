"""What people read of an encoder's capture in which no batch ran."""

from __future__ import annotations

from dataclasses import replace

from epdctl.encoder.making import Makings
from epdctl.rank.service import Recorded, Written
from epdctl.wire.encode import Source

__all__ = ["naming_the_cache"]


def naming_the_cache(makings: Makings, written: Written) -> Written:
    """``written``, which also hears of embeddings that were there already: nothing ran, and yet items were answered."""
    before = makings.counts[Source.CACHED]

    def said(recorded: Recorded) -> None:
        cached = makings.counts[Source.CACHED] - before
        if recorded.note is not None and cached:
            recorded = replace(recorded, note=f"{recorded.note}: {cached} embeddings came from the cache")
        written(recorded)

    return said
