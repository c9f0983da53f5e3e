"""Draws pictures of coloured shapes; numpy and Pillow only. Equal scenes give equal pixels."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from epdctl.bench.shapes import backgrounds
from epdctl.bench.shapes.backgrounds import Field

__all__ = ["Colour", "Figure", "Place", "Scene", "Shape", "coverage", "png", "render"]

Pixels = NDArray[np.uint8]  # [height, width, 3]


class Shape(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    CROSS = "cross"


class Colour(StrEnum):
    RED = "red"
    ORANGE = "orange"
    YELLOW = "yellow"
    GREEN = "green"
    CYAN = "cyan"
    BLUE = "blue"
    PURPLE = "purple"
    PINK = "pink"


class Place(StrEnum):
    LEFT = "left"
    RIGHT = "right"
    TOP = "top"
    BOTTOM = "bottom"


@dataclass(frozen=True, slots=True)
class Figure:
    """Lengths in pixels, ``turn`` in radians."""

    shape: Shape
    colour: Colour
    x: float
    y: float
    radius: float
    turn: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What is to be seen; ``seed`` decides about tones, texture, noise and blur."""

    width: int
    height: int
    background: str
    figures: tuple[Figure, ...]
    seed: int
    place: Place | None = None  # of a single figure, where it is plain to see


# Hue in degrees, saturation, value. Backgrounds stay below a saturation of MUTED, figures well above.
HUES: Mapping[Colour, tuple[float, float, float]] = {
    Colour.RED: (0, 0.92, 0.85),
    Colour.ORANGE: (29, 0.95, 1.0),
    Colour.YELLOW: (56, 0.92, 0.96),
    Colour.GREEN: (120, 0.82, 0.62),
    Colour.CYAN: (180, 0.88, 0.9),
    Colour.BLUE: (226, 0.88, 0.85),
    Colour.PURPLE: (275, 0.75, 0.7),
    Colour.PINK: (325, 0.55, 1.0),
}
MUTED = 0.22


def render(scene: Scene) -> Pixels:
    rng = np.random.default_rng(scene.seed)
    mixed = backgrounds.field(scene.background, rng, scene.width, scene.height)[..., None]
    canvas = (1 - mixed) * _muted(rng) + mixed * _muted(rng)
    for figure, covered in zip(scene.figures, coverage(scene), strict=True):
        canvas += covered[..., None] * (_tone(rng, figure.colour) - canvas)
    canvas = _blurred(canvas, rng.uniform(0.0, 0.2))
    canvas += rng.uniform(0.0, 0.04) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def png(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, "PNG")
    return file.getvalue()


def coverage(scene: Scene) -> list[Field]:
    """How much of each pixel each figure covers, from 0 to 1."""
    rows, columns = np.mgrid[0 : scene.height, 0 : scene.width].astype(np.float32)
    return [_covered(figure, columns + 0.5, rows + 0.5) for figure in scene.figures]


def _covered(figure: Figure, x: Field, y: Field) -> Field:
    cos, sin = np.float32(np.cos(figure.turn)), np.float32(np.sin(figure.turn))
    x, y = x - np.float32(figure.x), y - np.float32(figure.y)
    distance = _OUTLINES[figure.shape](x * cos + y * sin, y * cos - x * sin, figure.radius)
    return (0.5 - distance).clip(0, 1).astype(np.float32)


# Signed distances to an outline: negative inside. The radii make the four look about equally large.


def _circle(x: Field, y: Field, radius: float) -> Field:
    return np.hypot(x, y) - 0.92 * radius


def _square(x: Field, y: Field, radius: float) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.84 * radius


def _triangle(x: Field, y: Field, radius: float) -> Field:
    sides = np.float32(0.866) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(sides, y) - 0.6 * radius


def _cross(x: Field, y: Field, radius: float) -> Field:
    wide, narrow = radius, 0.34 * radius
    level = np.maximum(np.abs(x) - wide, np.abs(y) - narrow)
    upright = np.maximum(np.abs(x) - narrow, np.abs(y) - wide)
    return np.minimum(level, upright)


_OUTLINES: Mapping[Shape, Callable[[Field, Field, float], Field]] = {
    Shape.CIRCLE: _circle,
    Shape.SQUARE: _square,
    Shape.TRIANGLE: _triangle,
    Shape.CROSS: _cross,
}


def _muted(rng: np.random.Generator) -> NDArray[np.float32]:
    return _rgb(rng.random(), rng.uniform(0, MUTED), rng.uniform(0.1, 0.95))


def _tone(rng: np.random.Generator, colour: Colour) -> NDArray[np.float32]:
    hue, saturation, value = HUES[colour]
    near = rng.uniform(0.92, 1.08, 2)
    return _rgb((hue + rng.uniform(-5, 5)) / 360 % 1, min(saturation * near[0], 1.0), min(value * near[1], 1.0))


def _rgb(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def _blurred(canvas: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Each pixel gives ``share`` of itself to each neighbour, first in rows, then in columns."""
    keep, give = np.float32(1 - 2 * share), np.float32(share)
    edged = np.pad(canvas, ((1, 1), (0, 0), (0, 0)), "edge")
    canvas = keep * canvas + give * (edged[:-2] + edged[2:])
    edged = np.pad(canvas, ((0, 0), (1, 1), (0, 0)), "edge")
    return keep * canvas + give * (edged[:, :-2] + edged[:, 2:])
