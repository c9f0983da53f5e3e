"""Questions with a known answer, for health checks: ``python -m epdctl.bench.shapes.canary [--pictures N]``

Prints one JSON object: the pictures as base64 PNG, the prompt and the answer; free of torch.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

from epdctl.bench.shapes.draw import Colour, Figure, Scene, Shape, png
from epdctl.bench.shapes.questions import MOST_PICTURES, Question, colours

__all__ = ["Canary", "canary"]

SIDE = 48  # pixels
ORDER = (
    Colour.RED,
    Colour.BLUE,
    Colour.YELLOW,
    Colour.GREEN,
    Colour.PURPLE,
    Colour.ORANGE,
    Colour.CYAN,
    Colour.PINK,
)  # all differ, so that two pictures that changed places show


@dataclass(frozen=True, slots=True)
class Canary:
    pictures: tuple[bytes, ...]  # PNG files
    prompt: str
    answer: str


def canary(pictures: int = 2) -> Canary:
    """The same files on every call: plain circles before a flat background."""
    question = _question(pictures)
    return Canary(tuple(png(scene) for scene in question.scenes), question.prompt, question.answer)


def _question(pictures: int) -> Question:
    if not 2 <= pictures <= MOST_PICTURES:
        raise ValueError(f"a canary has 2 to {MOST_PICTURES} pictures, whose order shows; not {pictures}")
    return colours([_scene(colour) for colour in ORDER[:pictures]])


def _scene(colour: Colour) -> Scene:
    figure = Figure(Shape.CIRCLE, colour, SIDE / 2, SIDE / 2, SIDE / 4)
    return Scene(SIDE, SIDE, "flat", (figure,), seed=7)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.shapes.canary", description="Print a canary.")
    parser.add_argument("--pictures", type=int, default=2, choices=range(2, MOST_PICTURES + 1))
    found = canary(parser.parse_args(arguments).pictures)
    pictures = [base64.b64encode(picture).decode() for picture in found.pictures]
    print(json.dumps({"pictures": pictures, "prompt": found.prompt, "answer": found.answer}, indent=2))


if __name__ == "__main__":
    main()
