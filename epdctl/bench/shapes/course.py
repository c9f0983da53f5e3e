"""What is learnt when: courses, the stages of each, and how many pictures a question has by then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from epdctl.bench.shapes import scenes
from epdctl.bench.shapes.questions import MOST_PICTURES, Task
from epdctl.bench.shapes.scenes import World

__all__ = ["COURSES", "FIRST", "SIZES", "Course", "Progress", "Stage"]

MEMORY = 0.97  # of the running average
LONG = 4  # pictures
Levels = Mapping[Task, tuple[int, ...]]
SHORT: Levels = {Task.COLOURS: (2, 4, MOST_PICTURES), Task.SHAPES: (2, 4), Task.WHICH: (2, 4)}
LONGEST: dict[Task, tuple[int, ...]] = dict.fromkeys((Task.COLOURS, Task.SHAPES, Task.WHICH), (2, 4, MOST_PICTURES))


@dataclass(frozen=True, slots=True)
class Stage:
    """``tasks`` with how often each comes; none: the tower learns alone. The rate goes in a line between its ends.

    Where ``learnt`` of the answers are right, a question comes with more pictures.
    """

    name: str
    steps: int
    rate: tuple[float, float]
    tasks: Mapping[Task, float] = field(default_factory=dict)
    learnt: float = 0.9


@dataclass(frozen=True, slots=True)
class Course:
    stages: tuple[Stage, ...]
    world: World
    levels: Levels  # how many pictures a question of a task may have, in the order of learning
    mixed: float = 0.0  # probability that a lesson has pictures of several sizes
    seed: int = 0
    warmup: int = 100  # steps
    weight_decay: float = 0.02
    longest_gradient: float = 1.0
    lessons: int = 2  # per step
    sequences: int = 24  # per lesson of up to ``LONG`` pictures, half as many for more: their answers are longer
    lookout: int = 32  # pictures per step while the tower learns alone
    describing: float = 0.5  # weight of the tower's own losses beside an answer's
    average: float = 0.995  # of the weights, per step: what is kept is their running average

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def sequences_of(self, pictures: int) -> int:
        return self.sequences if pictures <= LONG else self.sequences // 2

    def stage(self, step: int) -> tuple[Stage, float]:
        """The stage of a step, and the learning rate."""
        start = 0
        for stage in self.stages:
            if step < start + stage.steps:
                first, last = stage.rate
                rate = first + (last - first) * (step - start) / stage.steps
                return stage, rate * min(1.0, (step + 1) / self.warmup)
            start += stage.steps
        raise IndexError(f"step {step} is beyond the last of {start}")


@dataclass(slots=True)
class Progress:
    """Running averages of what was right, by task and number of pictures."""

    right: dict[str, float] = field(default_factory=dict)

    def note(self, task: Task, pictures: int, right: float) -> None:
        key = f"{task} {pictures}"
        self.right[key] = MEMORY * self.right.get(key, 0.0) + (1 - MEMORY) * right

    def pictures(self, levels: Levels, task: Task, learnt: float, rng: np.random.Generator) -> int:
        """Two of ``level`` questions have as many as the task has come to, the others fewer: each length has to be
        learnt, and the longer the list the more there are."""
        if task not in levels:
            return 2 if task is Task.SAME else 1
        level = self._level(levels[task], task, learnt)
        return level if rng.random() < 2 / level else int(rng.integers(2, level + 1))

    def _level(self, levels: tuple[int, ...], task: Task, learnt: float) -> int:
        ahead = (level for level in levels if self.right.get(f"{task} {level}", 0.0) < learnt)
        return next(ahead, levels[-1])


SIMPLE = {Task.COLOUR: 1.0, Task.SHAPE: 1.0, Task.PLACE: 0.5, Task.COLOURS: 3.0, Task.SHAPES: 2.0}
ALL = {  # what is learnt last gets the most; lists of shapes are there because the one with a shape is learnt from them
    Task.COLOUR: 0.4,
    Task.SHAPE: 0.4,
    Task.COUNT: 3.0,
    Task.PLACE: 0.7,
    Task.COLOURS: 2.5,
    Task.SHAPES: 1.5,
    Task.WHICH: 4.0,
    Task.SAME: 1.5,
}
KNOWN = 0.0  # of the answers right, and lists have any length: they were learnt before
FIRST = Course(
    stages=(
        Stage("tower", 900, (1.5e-3, 1.5e-3)),
        Stage("lists", 500, (1.5e-3, 1.5e-3), SIMPLE),
        Stage("all", 1200, (1.5e-3, 1.5e-3), ALL, learnt=0.8),
        Stage("longer", 1500, (1.5e-3, 1.0e-3), ALL, learnt=0.8),
        Stage("end", 900, (1.0e-3, 1e-5), ALL, learnt=0.8),
    ),
    world=scenes.FIRST,
    levels=SHORT,
)
AGAIN = ALL | {Task.COUNT: 2.0, Task.SHAPES: 2.5, Task.WHICH: 2.5}
SIZES = Course(  # from the first one's weights
    stages=(
        Stage("sizes", 700, (7e-4, 6e-4), AGAIN, learnt=KNOWN),
        Stage("end", 400, (6e-4, 1e-5), AGAIN, learnt=KNOWN),
    ),
    world=scenes.TRAINED,
    levels=LONGEST,
    mixed=0.7,
    seed=1,
    describing=0.3,
)
LATE = {
    Task.COLOUR: 0.2,
    Task.SHAPE: 0.3,
    Task.COUNT: 4.0,
    Task.PLACE: 0.7,
    Task.COLOURS: 2.0,
    Task.SHAPES: 3.5,
    Task.WHICH: 2.5,
    Task.SAME: 0.5,
}
LAST = Course(  # what the second one left weakest, more gently
    stages=(Stage("end", 600, (5e-4, 1e-5), LATE, learnt=KNOWN),),
    world=scenes.TRAINED,
    levels=LONGEST | {Task.WHICH: (2, 4)},
    mixed=0.7,
    seed=2,
    describing=0.3,
)
COURSES = (FIRST, SIZES, LAST)  # in their order: each but the first begins from the weights of the one before
