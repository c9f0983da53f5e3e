"""Questions about ordered pictures, two of which changed places, and what is right then."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from epdctl.bench.shapes.questions import Question, Task, ask, colours, shapes, which
from epdctl.bench.shapes.scenes import Composer, Size

__all__ = ["Swap", "mixed", "swap"]


@dataclass(frozen=True, slots=True)
class Swap:
    """Pictures i and j of ``asked`` have one size, and another ``answer`` is right when they changed places."""

    asked: Question
    i: int
    j: int

    @property
    def answer(self) -> str:
        return _swapped(self.asked, self.i, self.j).answer


def swap(task: Task, composer: Composer, sizes: Sequence[Size]) -> Swap:
    """Any two of a question's pictures; there must be two of one size."""
    while True:
        question = ask(task, composer, sizes)
        swaps = [Swap(question, i, j) for i, j in itertools.combinations(range(len(sizes)), 2) if sizes[i] == sizes[j]]
        telling = [swap for swap in swaps if swap.answer != question.answer]
        if telling:
            return telling[int(composer.rng.integers(len(telling)))]


def mixed(composer: Composer, pictures: int) -> list[Size]:
    """Of each picture its own, but two of them, anywhere, have one."""
    sizes = [composer.size() for _ in range(pictures)]
    i, j = composer.rng.choice(pictures, 2, replace=False)
    sizes[i] = sizes[j]
    return sizes


def _swapped(question: Question, i: int, j: int) -> Question:
    """The same question about the pictures in their new order."""
    scenes = list(question.scenes)
    scenes[i], scenes[j] = scenes[j], scenes[i]
    match question.task:
        case Task.COLOURS:
            return colours(scenes)
        case Task.SHAPES:
            return shapes(scenes)
        case Task.WHICH:
            return which(scenes, question.scenes[int(question.answer) - 1].figures[0].shape)
    raise ValueError(f"the order does not matter for {question.task}")
