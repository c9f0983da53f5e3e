"""The largest thing that a request may show to a model, by its family's own rule. Pure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from epdctl.errors import LoadError
from epdctl.families import open_family
from epdctl.families.base import Family, Header, PictureHeader, SoundHeader
from epdctl.ids import Modality

__all__ = ["Bounds", "Largest", "largest"]

_LONG = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (5, 2), (3, 1), (4, 1), (5, 1), (6, 1))
_SIDES = (*_LONG, *((down, across) for across, down in _LONG[1:]))
_HALVINGS = 8  # where a family refuses the largest pictures, or makes fewer rows of them
_RATE = 48_000  # samples a second; a family reckons in its own


@dataclass(frozen=True, slots=True)
class Bounds:
    """What of limits holds for one medium."""

    pixels: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Largest:
    """``what``: in words, with its size; ``rows``: how many embeddings it becomes."""

    what: str
    rows: int


def largest(directory: Path, bounds: Bounds) -> Largest | None:
    """Of the ordinary shapes within ``bounds``, alone in its request. None where the checkpoint's files do not say:
    the gateway, which reads them too, will say why."""
    try:
        family = open_family(directory)
    except LoadError:
        return None
    found = [
        Largest(what, rows)
        for modality in family.modalities
        for what, header in _headers(modality, bounds)
        if (rows := _rows(family, header))
    ]
    return max(found, key=lambda one: one.rows, default=None)


def _rows(family: Family, header: Header) -> int:
    """0 for what the family refuses."""
    with contextlib.suppress(ValueError):
        return family.span(header, 1).rows
    return 0


def _headers(modality: Modality, bounds: Bounds) -> Iterator[tuple[str, Header]]:
    if modality is Modality.AUDIO:
        yield f"a sound clip of {bounds.seconds:g} s", SoundHeader(int(bounds.seconds * _RATE), _RATE)
        return
    for halving in range(_HALVINGS):
        for across, down in _SIDES:
            unit = math.isqrt((bounds.pixels >> halving) // (across * down))  # whole: families round by exact shapes
            width, height = across * unit, down * unit
            yield f"a picture of {width} x {height} pixels", PictureHeader(width, height)
