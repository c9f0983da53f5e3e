"""Composes scenes at random: which figures, where, before what. A seed gives the same scenes everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from epdctl.bench.shapes import backgrounds
from epdctl.bench.shapes.draw import Colour, Figure, Place, Scene, Shape

__all__ = ["COUNTS", "FIRST", "TRAINED", "UNSEEN", "Composer", "Size", "World"]

Choice = TypeVar("Choice")
Size = tuple[int, int]  # width, height in pixels
COUNTS = (1, 2, 3, 4)
GAP = 2.0  # pixels between two figures
TURN = 0.22  # radians, either way


@dataclass(frozen=True, slots=True)
class World:
    """Kinds of background, and sizes with how often each comes."""

    backgrounds: Sequence[str]
    sizes: Sequence[Size]
    weights: Sequence[float]


FIRST = World(backgrounds.TRAINED, ((48, 48), (64, 48), (48, 64), (64, 64)), (0.44, 0.16, 0.16, 0.24))
TRAINED = World(
    backgrounds.TRAINED,
    (*FIRST.sizes, (96, 48), (48, 96), (80, 64)),
    (0.28, 0.14, 0.14, 0.14, 0.1, 0.1, 0.1),
)
# What the processor makes of these is none of the trained sizes either: 80x48, 48x80 and 64x80.
UNSEEN = World(
    backgrounds.UNSEEN,
    ((80, 48), (48, 80), (64, 80), (76, 44), (66, 82), (112, 63)),
    (0.25, 0.25, 0.2, 0.1, 0.1, 0.1),
)


class Composer:
    """Draws from one stream of random numbers; two composers of one seed say the same things in the same order."""

    def __init__(self, world: World, seed: int | Sequence[int]) -> None:
        self.rng = np.random.default_rng(seed)
        self._world = world

    def size(self) -> Size:
        return self._world.sizes[self.rng.choice(len(self._world.sizes), p=self._world.weights)]

    def palette(self, mixed: float) -> Sequence[Size]:
        """One size, or, with a probability of ``mixed``, two or three."""
        if mixed and self.rng.random() < mixed:
            several = self.rng.choice(len(self._world.sizes), self.rng.integers(2, 4), False, self._world.weights)
            return [self._world.sizes[index] for index in several]
        return [self.size()]

    def sizes(self, palette: Sequence[Size], pictures: int) -> list[Size]:
        return [self._one_of(palette) for _ in range(pictures)]

    def colour(self, but: Colour | None = None) -> Colour:
        return self._one_of([colour for colour in Colour if colour is not but])

    def shape(self, but: Shape | None = None) -> Shape:
        return self._one_of([shape for shape in Shape if shape is not but])

    def one(self, size: Size, shape: Shape | None = None, colour: Colour | None = None) -> Scene:
        """A single figure, anywhere."""
        radius = self.rng.uniform(0.18, 0.3) * min(size)
        x, y = (self.rng.uniform(radius, side - radius) for side in size)
        return self._scene(size, [self._figure(x, y, radius, (shape or self.shape(), colour or self.colour()))])

    def placed(self, size: Size, place: Place | None = None) -> Scene:
        """A single figure at one of the sides."""
        place = place or self._one_of(list(Place))
        along, across = self.rng.uniform(0.22, 0.3), self.rng.uniform(-0.1, 0.1)
        if place in (Place.LEFT, Place.TOP):
            along = -along
        right, down = (along, across) if place in (Place.LEFT, Place.RIGHT) else (across, along)
        radius = self.rng.uniform(0.15, 0.2) * min(size)
        kind = self.shape(), self.colour()
        return self._scene(size, [self._figure(size[0] * (0.5 + right), size[1] * (0.5 + down), radius, kind)], place)

    def several(self, size: Size, count: int) -> Scene:
        """``count`` figures that do not touch."""
        while True:
            figures = self._scattered(size, count)
            if figures is not None:
                return self._scene(size, figures)

    def _scattered(self, size: Size, count: int) -> list[Figure] | None:
        figures: list[Figure] = []
        for _ in range(20 * count):
            radius = self.rng.uniform(0.12, 0.17) * min(size)
            x, y = (self.rng.uniform(radius, side - radius) for side in size)
            if all(math.hypot(x - it.x, y - it.y) > radius + it.radius + GAP for it in figures):
                figures.append(self._figure(x, y, radius, (self.shape(), self.colour())))
            if len(figures) == count:
                return figures
        return None

    def _figure(self, x: float, y: float, radius: float, kind: tuple[Shape, Colour]) -> Figure:
        return Figure(*kind, float(x), float(y), float(radius), float(self.rng.uniform(-TURN, TURN)))

    def _scene(self, size: Size, figures: Sequence[Figure], place: Place | None = None) -> Scene:
        kind = self._one_of(list(self._world.backgrounds))
        return Scene(*size, kind, tuple(figures), int(self.rng.integers(2**31)), place)

    def _one_of(self, choices: Sequence[Choice]) -> Choice:
        return choices[int(self.rng.integers(len(choices)))]
