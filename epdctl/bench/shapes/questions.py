"""What the model is asked about pictures, and what it should answer; free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from epdctl.bench.shapes.draw import Scene, Shape
from epdctl.bench.shapes.scenes import COUNTS, Composer, Size

__all__ = ["MOST_PICTURES", "Question", "Task", "ask", "colours", "messages", "shapes", "which"]

MOST_PICTURES = 8


class Task(StrEnum):
    COLOUR = "colour"
    SHAPE = "shape"
    COUNT = "count"
    PLACE = "place"
    COLOURS = "colours"
    SHAPES = "shapes"
    WHICH = "which"
    SAME = "same"


@dataclass(frozen=True, slots=True)
class Question:
    """``prompt`` follows the pictures; ``answer`` is the whole of the right one."""

    task: Task
    prompt: str
    answer: str
    scenes: tuple[Scene, ...]


def ask(task: Task, composer: Composer, sizes: Sequence[Size]) -> Question:
    """A new question; a size for each of its pictures, of which it may need fewer."""
    return _ASK[task](composer, sizes)


def messages(question: Question) -> list[dict[str, Any]]:
    """As a chat template reads them: the pictures first."""
    pictures: list[dict[str, Any]] = [{"type": "image"} for _ in question.scenes]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question.prompt}]}]


def colours(scenes: Sequence[Scene]) -> Question:
    """Of single figures, in their order."""
    named = (f"{number} {scene.figures[0].colour}" for number, scene in enumerate(scenes, 1))
    return Question(Task.COLOURS, "Which colour is in each picture?", ", ".join(named), tuple(scenes))


def shapes(scenes: Sequence[Scene]) -> Question:
    """Of single figures, in their order."""
    named = (f"{number} {scene.figures[0].shape}" for number, scene in enumerate(scenes, 1))
    return Question(Task.SHAPES, "Which shape is in each picture?", ", ".join(named), tuple(scenes))


def which(scenes: Sequence[Scene], shape: Shape) -> Question:
    """One of ``scenes`` shows that shape."""
    (number,) = (number for number, scene in enumerate(scenes, 1) if scene.figures[0].shape is shape)
    return Question(Task.WHICH, f"Which picture shows the {shape}?", str(number), tuple(scenes))


def _ask_colour(composer: Composer, sizes: Sequence[Size]) -> Question:
    scene = composer.one(sizes[0])
    return Question(Task.COLOUR, "What colour is the shape?", str(scene.figures[0].colour), (scene,))


def _ask_shape(composer: Composer, sizes: Sequence[Size]) -> Question:
    scene = composer.one(sizes[0])
    return Question(Task.SHAPE, "What shape is it?", str(scene.figures[0].shape), (scene,))


def _ask_count(composer: Composer, sizes: Sequence[Size]) -> Question:
    count = int(composer.rng.choice(COUNTS))
    return Question(Task.COUNT, "How many shapes are there?", str(count), (composer.several(sizes[0], count),))


def _ask_place(composer: Composer, sizes: Sequence[Size]) -> Question:
    scene = composer.placed(sizes[0])
    return Question(Task.PLACE, "Where is the shape?", str(scene.place), (scene,))


def _ask_colours(composer: Composer, sizes: Sequence[Size]) -> Question:
    return colours([composer.one(size) for size in sizes])


def _ask_shapes(composer: Composer, sizes: Sequence[Size]) -> Question:
    return shapes([composer.one(size) for size in sizes])


def _ask_which(composer: Composer, sizes: Sequence[Size]) -> Question:
    shape, at = composer.shape(), int(composer.rng.integers(len(sizes)))
    shapes = [shape if index == at else composer.shape(but=shape) for index in range(len(sizes))]
    return which([composer.one(size, each) for size, each in zip(sizes, shapes, strict=True)], shape)


def _ask_same(composer: Composer, sizes: Sequence[Size]) -> Question:
    """No more often than yes; then colour, shape or both differ."""
    shape, colour = composer.shape(), composer.colour()
    other = int(composer.rng.choice(6))  # 0: the shape, 1: the colour, 2: both, from 3: nothing
    left = composer.one(sizes[0], shape, colour)
    right = composer.one(
        sizes[1],
        composer.shape(but=shape) if other in (0, 2) else shape,
        composer.colour(but=colour) if other in (1, 2) else colour,
    )
    return Question(Task.SAME, "Are both pictures the same?", "yes" if other > 2 else "no", (left, right))


_ASK: Mapping[Task, Callable[[Composer, Sequence[Size]], Question]] = {
    Task.COLOUR: _ask_colour,
    Task.SHAPE: _ask_shape,
    Task.COUNT: _ask_count,
    Task.PLACE: _ask_place,
    Task.COLOURS: _ask_colours,
    Task.SHAPES: _ask_shapes,
    Task.WHICH: _ask_which,
    Task.SAME: _ask_same,
}
