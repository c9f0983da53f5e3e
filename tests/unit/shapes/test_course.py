"""Stages follow each other, rates go in lines, and pictures become more as they are learnt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from epdctl.bench.shapes.course import FIRST, LONGEST, SHORT, SIZES, Course, Progress, Stage
from epdctl.bench.shapes.questions import Task
from epdctl.bench.shapes.scenes import TRAINED

TWO = (Stage("one", 10, (1.0, 1.0)), Stage("two", 10, (1.0, 0.0), {Task.COLOUR: 1.0}))
BRIEF = Course(TWO, TRAINED, SHORT, warmup=5)


def test_stages_follow_each_other_to_the_end() -> None:
    assert [BRIEF.stage(step)[0].name for step in range(BRIEF.steps)] == ["one"] * 10 + ["two"] * 10
    with pytest.raises(IndexError, match="step 20 is beyond the last of 20"):
        BRIEF.stage(20)


def test_rates_rise_then_go_from_end_to_end() -> None:
    rates = [BRIEF.stage(step)[1] for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:11] == [1.0] * 6
    assert rates[11:] == pytest.approx([1 - step / 10 for step in range(1, 10)])


def test_the_tower_learns_first_and_alone() -> None:
    assert not FIRST.stages[0].tasks
    assert {task for stage in FIRST.stages for task in stage.tasks} == set(Task)


def test_the_second_course_asks_everything_of_any_length_from_its_first_step() -> None:
    rng = np.random.default_rng(0)
    for stage, (task, levels) in itertools.product(SIZES.stages, LONGEST.items()):
        assert set(stage.tasks) == set(Task)
        found = {Progress().pictures(SIZES.levels, task, stage.learnt, rng) for _ in range(200)}
        assert found == set(range(2, levels[-1] + 1))


def learn(progress: Progress, task: Task, pictures: int) -> None:
    for _ in range(200):
        progress.note(task, pictures, 1.0)


def pictures(progress: Progress, task: Task) -> set[int]:
    rng = np.random.default_rng(0)
    return {progress.pictures(SHORT, task, 0.9, rng) for _ in range(200)}


def test_lists_grow_as_they_are_learnt() -> None:
    progress = Progress()
    assert pictures(progress, Task.COLOURS) == {2}
    learn(progress, Task.COLOURS, 2)
    assert pictures(progress, Task.COLOURS) == {2, 3, 4}
    learn(progress, Task.COLOURS, 4)
    assert pictures(progress, Task.COLOURS) == {2, 3, 4, 5, 6, 7, 8}
    learn(progress, Task.COLOURS, 8)
    assert max(pictures(progress, Task.COLOURS)) == 8
    assert pictures(progress, Task.WHICH) == {2}


def test_other_questions_have_as_many_pictures_as_they_need() -> None:
    progress = Progress()
    assert pictures(progress, Task.SAME) == {2}
    for task in (Task.COLOUR, Task.SHAPE, Task.COUNT, Task.PLACE):
        assert pictures(progress, task) == {1}


def test_a_patient_course_waits_longer() -> None:
    progress = Progress({"colours 2": 0.85})
    rng = np.random.default_rng(0)
    assert {progress.pictures(SHORT, Task.COLOURS, 0.9, rng) for _ in range(99)} == {2}
    assert {progress.pictures(SHORT, Task.COLOURS, 0.8, rng) for _ in range(99)} == {2, 3, 4}


def test_one_good_lesson_is_not_enough() -> None:
    progress = Progress()
    progress.note(Task.COLOURS, 2, 1.0)
    assert pictures(progress, Task.COLOURS) == {2}
