"""Draws the learning curve from a run's log: ``python -m epdctl.bench.shapes.curve LOG PICTURE``"""

from __future__ import annotations

import argparse
import colorsys
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

__all__ = ["draw_curve"]

WIDTH, HEIGHT = 960, 480  # pixels
LEFT, RIGHT, TOP, BOTTOM = 50, 160, 30, 40  # margins
SMOOTH = 6  # lines of the log to a point

Line = dict[str, float | str]


def draw_curve(lines: Sequence[Line]) -> Image.Image:
    """Shares of right answers over minutes, one colour for each kind of question."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    minutes = max(float(line["seconds"]) for line in lines) / 60
    _frame(pen, minutes)
    names = sorted({name for line in lines for name in line if name == "tower" or name.split(" ")[-1].isdigit()})
    for index, name in enumerate(names):
        colour = _colour(index, len(names))
        points = [_place(at / minutes, right) for at, right in _averages(lines, name)]
        if len(points) > 1:
            pen.line(points, fill=colour, width=2)
        pen.text((WIDTH - RIGHT + 12, TOP + 18 * index), name, fill=colour)
    return image


def _frame(pen: ImageDraw.ImageDraw, minutes: float) -> None:
    pen.text((LEFT, 8), "shapes-vl: share of training answers that are wholly right, over minutes", fill="black")
    for tenth in range(0, 11, 2):
        pen.line([_place(0, tenth / 10), _place(1, tenth / 10)], fill="lightgrey")
        pen.text((12, _place(0, tenth / 10)[1] - 6), f"{tenth * 10} %", fill="black")
    for part in range(6):
        pen.text((_place(part / 5, 0)[0] - 8, HEIGHT - BOTTOM + 8), f"{minutes * part / 5:.0f}", fill="black")


def _averages(lines: Sequence[Line], name: str) -> list[tuple[float, float]]:
    found = [(float(line["seconds"]) / 60, float(line[name])) for line in lines if name in line]
    groups = [found[start : start + SMOOTH] for start in range(0, len(found), SMOOTH)]
    return [(group[-1][0], sum(right for _, right in group) / len(group)) for group in groups]


def _place(across: float, up: float) -> tuple[float, float]:
    return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _colour(index: int, of: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index / of, 0.9, 0.5 + 0.3 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.shapes.curve", description="Draw a learning curve.")
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.log.read_text(encoding="utf-8").splitlines()]
    draw_curve(lines).quantize(64).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
