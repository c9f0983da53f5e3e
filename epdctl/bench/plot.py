"""A small picture of bandwidth over size, both axes logarithmic. Drawn with Pillow: it is there already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

__all__ = ["draw"]

Point = tuple[float, float]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 560, 80, 40, 240, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f", "#bcbd22")
LABEL_WIDTH = 46
UNITS = ("B", "KiB", "MiB", "GiB")


def draw(series: Mapping[str, Sequence[Point]], title: str, path: Path) -> None:
    """``series``: name → (bytes, GB/s) points; written to ``path`` as a PNG."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    points = [point for line in series.values() for point in line]
    across = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT, 2)
    up = _axis([y for _, y in points], HEIGHT - BOTTOM, TOP, 10)
    _frame(pen, points, across, up)
    pen.text((LEFT, 12), title, fill="black")
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        spots = [(across(x), up(y)) for x, y in sorted(line)]
        pen.line(spots, fill=colour, width=2)
        for x, y in spots:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        pen.text((WIDTH - RIGHT + 20, TOP + 18 * index), name, fill=colour)
    image.save(path, "PNG")


def _axis(values: Sequence[float], start: float, end: float, base: float) -> Callable[[float], float]:
    """A value's place in pixels; whole powers of ``base`` at both ends."""
    low = math.floor(math.log(min(values), base))
    high = max(low + 1, math.ceil(math.log(max(values), base)))
    return lambda value: start + (math.log(value, base) - low) / (high - low) * (end - start)


def _frame(
    pen: ImageDraw.ImageDraw,
    points: Sequence[Point],
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> None:
    told = -math.inf  # where the last size was written
    for size in sorted({x for x, _ in points}):
        pen.line([(across(size), TOP), (across(size), HEIGHT - BOTTOM)], fill="#e0e0e0")
        if across(size) - told >= LABEL_WIDTH:
            told = across(size)
            pen.text((told - 20, HEIGHT - BOTTOM + 8), _amount(size), fill="black")
    slowest, fastest = min(y for _, y in points), max(y for _, y in points)
    for power in range(math.floor(math.log10(slowest)), math.ceil(math.log10(fastest)) + 1):
        pen.line([(LEFT, up(10.0**power)), (WIDTH - RIGHT, up(10.0**power))], fill="#e0e0e0")
        pen.text((10, up(10.0**power) - 6), f"{10.0**power:g} GB/s", fill="black")


def _amount(size: float) -> str:
    power = min(3, int(math.log(size, 1024)))
    return f"{size / 1024**power:.0f} {UNITS[power]}"
