"""Patterns behind the shapes: each a field of values from 0 to 1, that the picture mixes two muted tones by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "TRAINED", "UNSEEN", "Field", "field"]

Field = NDArray[np.floating[Any]]  # [height, width]
Pattern = Callable[[np.random.Generator, Field, Field], Field]


def field(kind: str, rng: np.random.Generator, width: int, height: int) -> Field:
    """The pattern ``kind``, drawn with ``rng``; raises KeyError for a kind that does not exist."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    values: Field = KINDS[kind](rng, columns, rows).astype(np.float32)
    return values


def _flat(rng: np.random.Generator, x: Field, y: Field) -> Field:
    return np.zeros_like(x)


def _ramp(rng: np.random.Generator, x: Field, y: Field) -> Field:
    return _stretched(_along(rng, x, y))


def _glow(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Brighter towards one point."""
    return _stretched(_from_a_point(rng, x, y))


def _stripes(rng: np.random.Generator, x: Field, y: Field) -> Field:
    return _steps(_along(rng, x, y) / rng.uniform(3, 10))


def _checks(rng: np.random.Generator, x: Field, y: Field) -> Field:
    side = rng.uniform(3, 11)
    return _steps(np.floor(x / side + rng.uniform(0, 2)) + np.floor(y / side + rng.uniform(0, 2)))


def _sines(rng: np.random.Generator, x: Field, y: Field) -> Field:
    waves = [np.sin(_along(rng, x, y) * 2 * np.pi / rng.uniform(6, 30) + rng.uniform(0, 6.3)) for _ in range(2)]
    return _stretched(waves[0] + waves[1])


def _blobs(rng: np.random.Generator, x: Field, y: Field) -> Field:
    total = np.zeros_like(x)
    for _ in range(5):
        distance = _from_a_point(rng, x, y)
        total += np.exp(-0.5 * (distance / rng.uniform(3, 10)) ** 2)
    return np.minimum(total, 1.0)


def _grain(rng: np.random.Generator, x: Field, y: Field) -> Field:
    return rng.random(x.shape, dtype=np.float32)


def _patches(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Coarse noise: squares of random tones."""
    side = int(rng.integers(2, 9))
    coarse = rng.random((x.shape[0] // side + 2, x.shape[1] // side + 2), dtype=np.float32)
    return coarse.repeat(side, 0).repeat(side, 1)[: x.shape[0], : x.shape[1]]


def _clouds(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Noise whose spectrum falls with the frequency, as in photographs."""
    height, width = x.shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency ** rng.uniform(0.8, 1.6)
    spectrum[0, 0] = 0.0
    return _stretched(np.fft.irfft2(spectrum, (height, width)))


def _rings(rng: np.random.Generator, x: Field, y: Field) -> Field:
    return _steps(_from_a_point(rng, x, y) / rng.uniform(3, 9))


def _bricks(rng: np.random.Generator, x: Field, y: Field) -> Field:
    height = rng.uniform(5, 9)
    row = np.floor(y / height)
    column = x + row % 2 * height
    return np.where((y % height < 1.5) | (column % (2 * height) < 1.5), 1.0, 0.0)


def _marble(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Veins: waves bent by clouds."""
    bent = _along(rng, x, y) + 16 * _clouds(rng, x, y)
    veins: Field = np.abs(np.sin(bent * np.pi / rng.uniform(5, 14)))
    return veins


def _along(rng: np.random.Generator, x: Field, y: Field) -> Field:
    """Pixels along a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    pixels: Field = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 16)
    return pixels


def _from_a_point(rng: np.random.Generator, x: Field, y: Field) -> Field:
    height, width = x.shape
    distance: Field = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height))
    return distance


def _steps(values: Field) -> Field:
    steps: Field = np.floor(values) % 2
    return steps


def _stretched(values: Field) -> Field:
    low, high = values.min(), values.max()
    stretched: Field = (values - low) / max(high - low, 1e-6)
    return stretched


TRAINED = ("flat", "ramp", "glow", "stripes", "checks", "sines", "blobs", "grain", "patches", "clouds")
UNSEEN = ("rings", "bricks", "marble")
KINDS: Mapping[str, Pattern] = {
    "flat": _flat,
    "ramp": _ramp,
    "glow": _glow,
    "stripes": _stripes,
    "checks": _checks,
    "sines": _sines,
    "blobs": _blobs,
    "grain": _grain,
    "patches": _patches,
    "clouds": _clouds,
    "rings": _rings,
    "bricks": _bricks,
    "marble": _marble,
}
