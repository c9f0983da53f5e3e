"""Every answer follows from what was drawn."""

from __future__ import annotations

from collections import Counter

import pytest

from epdctl.bench.shapes.draw import Shape
from epdctl.bench.shapes.questions import Question, Task, ask, colours, messages, which
from epdctl.bench.shapes.scenes import TRAINED, Composer, Size

SIZES = ((48, 48), (64, 48), (96, 48), (48, 64))
MANY = 200


def sizes(pictures: int) -> list[Size]:
    return [SIZES[index % len(SIZES)] for index in range(pictures)]


def asked(task: Task, pictures: int = 1, many: int = MANY) -> list[Question]:
    composer = Composer(TRAINED, 11)
    return [ask(task, composer, sizes(pictures)) for _ in range(many)]


def test_single_pictures_are_answered_with_what_they_show() -> None:
    for question in asked(Task.COLOUR):
        assert question.answer == question.scenes[0].figures[0].colour
    for question in asked(Task.SHAPE):
        assert question.answer == question.scenes[0].figures[0].shape
    for question in asked(Task.COUNT):
        assert question.answer == str(len(question.scenes[0].figures))
    for question in asked(Task.PLACE):
        assert question.answer == question.scenes[0].place


@pytest.mark.parametrize("task", [Task.COLOUR, Task.SHAPE, Task.COUNT, Task.PLACE])
def test_no_answer_is_much_more_frequent_than_another(task: Task) -> None:
    found = Counter(question.answer for question in asked(task, many=400))
    assert max(found.values()) < 2 * min(found.values())


@pytest.mark.parametrize("pictures", [2, 4, 8])
@pytest.mark.parametrize(("task", "named"), [(Task.COLOURS, "colour"), (Task.SHAPES, "shape")])
def test_lists_are_numbered_in_the_order_of_the_pictures(task: Task, named: str, pictures: int) -> None:
    for question in asked(task, pictures, 20):
        parts = [part.split(" ") for part in question.answer.split(", ")]
        assert [number for number, _ in parts] == [str(number) for number in range(1, pictures + 1)]
        assert [name for _, name in parts] == [getattr(scene.figures[0], named) for scene in question.scenes]


def test_which_picture_has_one_right_answer_anywhere() -> None:
    questions = asked(Task.WHICH, 4)
    for question in questions:
        (shape,) = [shape for shape in Shape if shape in question.prompt]
        shown = [scene.figures[0].shape for scene in question.scenes]
        assert [number for number, each in enumerate(shown, 1) if each is shape] == [int(question.answer)]
    assert {question.answer for question in questions} == {"1", "2", "3", "4"}


def test_a_question_of_which_without_one_answer_is_refused() -> None:
    composer = Composer(TRAINED, 12)
    with pytest.raises(ValueError, match="unpack"):
        which([composer.one(SIZES[0], Shape.CROSS) for _ in range(2)], Shape.CROSS)


def test_same_means_shape_and_colour_and_is_so_half_of_the_time() -> None:
    questions = asked(Task.SAME, 2)
    for question in questions:
        left, right = (scene.figures[0] for scene in question.scenes)
        assert question.answer == ("yes" if (left.shape, left.colour) == (right.shape, right.colour) else "no")
    yes = sum(question.answer == "yes" for question in questions)
    assert 0.4 * MANY < yes < 0.6 * MANY


@pytest.mark.parametrize("task", [Task.COLOURS, Task.SHAPES, Task.WHICH])
def test_each_picture_has_its_own_size(task: Task) -> None:
    for question in asked(task, 8, 5):
        assert [(scene.width, scene.height) for scene in question.scenes] == sizes(8)


def test_pictures_come_before_the_words() -> None:
    question = colours([scene for each in asked(Task.COLOUR, many=3) for scene in each.scenes])
    (message,) = messages(question)
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image", "image", "image", "text"]
    assert message["content"][-1]["text"] == question.prompt
