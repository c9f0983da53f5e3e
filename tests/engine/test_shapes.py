"""``shapes-vl``: the weights are the recorded ones, load everywhere, and answer as well as was written down."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from epdctl.bench.shapes.accuracy import EXAMS, Exam, measure
from epdctl.bench.shapes.course import COURSE, Stage
from epdctl.bench.shapes.draw import render
from epdctl.bench.shapes.lessons import Writer, lookout, patches, study
from epdctl.bench.shapes.model import DIRECTORY, LARGEST, pack
from epdctl.bench.shapes.publish import RECORD, fingerprint
from epdctl.bench.shapes.questions import Task, ask, colours
from epdctl.bench.shapes.reader import Reader
from epdctl.bench.shapes.scenes import TRAINED, UNSEEN, Composer, World
from epdctl.bench.shapes.student import Student
from epdctl.bench.shapes.tokens import LARGEST as LARGEST_VOCABULARY
from epdctl.bench.shapes.tokens import make_tokenizer
from epdctl.bench.shapes.train import Training
from epdctl.engine.loading import load_language, load_tower
from tests.support.checkpoints import model_config

CPU = torch.device("cpu")
LARGEST_BYTES = 4 * 2**20
FEW, MANY = 40, 500  # questions a task
SHORT = replace(COURSE, stages=(Stage("tower", 90, (1.5e-3, 1.5e-3)),), lookout=24, warmup=20)
MIXED = replace(
    COURSE,
    stages=(Stage("tower", 2, (1e-3, 1e-3)), Stage("all", 4, (1e-3, 1e-3), dict.fromkeys(Task, 1.0))),
    sequences=2,
)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(DIRECTORY)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DIRECTORY / RECORD).read_text())
    return found


def test_the_weights_are_the_recorded_ones(record: dict[str, Any]) -> None:
    assert fingerprint(DIRECTORY) == record["sha256"]


def test_all_of_it_is_small_and_stored_in_16_bits() -> None:
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= LARGEST_BYTES
    weights = load_file(DIRECTORY / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_the_tokenizer_is_the_one_the_script_makes() -> None:
    made = make_tokenizer()
    assert made.get_vocab_size() <= LARGEST_VOCABULARY
    assert made.to_str(pretty=True) == (DIRECTORY / "tokenizer.json").read_text(encoding="utf-8")


def test_both_halves_load_by_themselves_and_are_the_whole(reader: Reader) -> None:
    tower: Any = load_tower(model_config(DIRECTORY), CPU)
    language: Any = load_language(model_config(DIRECTORY), CPU)
    halves = tower.module.state_dict() | language.module.state_dict()
    whole = reader.model.state_dict()
    assert set(halves) == set(whole)
    assert all(torch.equal(value, whole[name]) for name, value in halves.items())


@pytest.mark.parametrize("size", [(width, height) for width, height in TRAINED.sizes if width * height <= LARGEST])
def test_patches_are_what_the_processor_makes(size: tuple[int, int], reader: Reader) -> None:
    composer = Composer(TRAINED, 3)
    pictures = [render(composer.one(size)) for _ in range(2)]
    wanted = reader.processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    torch.testing.assert_close(patches(np.stack(pictures)), wanted["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("task", "pictures"), [(Task.COLOUR, 1), (Task.SAME, 2), (Task.COLOURS, 4), (Task.WHICH, 3)])
def test_the_student_computes_what_the_library_does(task: Task, pictures: int) -> None:
    """Its attention and its batches are its own; the loss must not be."""
    fresh = Reader(DIRECTORY)
    composer, writer = Composer(TRAINED, 4), Writer(make_tokenizer())
    lesson = study(task, composer, writer, pictures, 3)
    pixels = lesson.sight.pixels.view(len(lesson.sight.grids), -1, lesson.sight.pixels.shape[-1])
    with torch.no_grad():
        logits = fresh.model(
            input_ids=lesson.tokens,
            pixel_values=pixels[lesson.shown.flatten()].flatten(0, 1),
            image_grid_thw=lesson.sight.grids[lesson.shown.flatten()],
            mm_token_type_ids=(lesson.tokens == fresh.model.config.image_token_id).int(),
        ).logits[:, lesson.answer - 1 : -1]
        student = Student(fresh.model)
        score = student.answer(student.see(lesson.sight), lesson)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), lesson.tokens[:, lesson.answer :].flatten())
    assert score.loss.item() == pytest.approx(wanted.item(), abs=1e-4)
    assert score.right == (logits.argmax(-1) == lesson.tokens[:, lesson.answer :]).all(1).float().mean()


@pytest.mark.parametrize("task", Task)
def test_a_lesson_reads_as_the_chat_template_writes(task: Task, reader: Reader) -> None:
    question = ask(task, Composer(TRAINED, 5), (64, 48), 3)
    tokens, answer = Writer(make_tokenizer()).write([question])
    grids = torch.tensor([[1, 6, 8]] * len(question.scenes))
    (prompt,) = reader._prompts([question], grids)
    assert tokens[0, :answer].tolist() == reader.tokenizer(prompt)["input_ids"]
    assert reader.tokenizer.decode(tokens[0, answer:]) == f"{question.answer}<|im_end|>"


def test_a_minute_of_training_teaches_the_tower_something() -> None:
    training = Training(SHORT)
    losses = [training.advance()["tower loss"] for _ in range(SHORT.steps)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = Training(MIXED)
    for _ in range(5):
        whole.advance()
    first = Training(MIXED)
    for _ in range(3):
        first.advance()
    first.save(tmp_path / "state.pt")
    second = Training(MIXED)
    second.load(tmp_path / "state.pt")
    for _ in range(2):
        second.advance()
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(second.average.state_dict()[name], value, msg=name)


def test_a_checkpoint_is_the_running_average_in_16_bits(tmp_path: Path) -> None:
    training = Training(MIXED)
    training.advance()
    pack(tmp_path, training.tokenizer, training.average.model)
    stored = Reader(tmp_path).model.state_dict()
    for name, value in training.average.model.state_dict().items():
        assert torch.equal(stored[name], value.bfloat16().float()), name


def spread(share: float, asked: int) -> float:
    """Three standard deviations of a share among ``asked``; of one in a hundred at least."""
    share = min(max(share, 0.01), 0.99)
    return 3 * math.sqrt(share * (1 - share) / asked)


def recorded(record: dict[str, Any], exam: Exam, world: World) -> float:
    return float(record["accuracy"]["tasks"][exam.name]["trained" if world is TRAINED else "unseen"])


@pytest.mark.parametrize("exam", EXAMS, ids=lambda exam: exam.name)
def test_a_few_pictures_are_answered_as_well_as_recorded(exam: Exam, reader: Reader, record: dict[str, Any]) -> None:
    for world in (TRAINED, UNSEEN):
        wanted = recorded(record, exam, world)
        assert measure(reader, exam, world, FEW) >= wanted - spread(wanted, FEW)


@pytest.mark.accuracy
@pytest.mark.parametrize("exam", EXAMS, ids=lambda exam: exam.name)
def test_many_pictures_are_answered_as_well_as_recorded(exam: Exam, reader: Reader, record: dict[str, Any]) -> None:
    for world in (TRAINED, UNSEEN):
        wanted = recorded(record, exam, world)
        assert measure(reader, exam, world, MANY) == pytest.approx(wanted, abs=0.01)


@pytest.fixture
def blind() -> Iterator[Reader]:
    """Whose tower says nothing."""
    reader = Reader(DIRECTORY)
    merger = reader.model.model.visual.merger
    hook = merger.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    yield reader
    hook.remove()


CHANCE = {Task.COLOUR: 1 / 8, Task.SHAPE: 1 / 4, Task.COUNT: 1 / 4, Task.PLACE: 1 / 4, Task.WHICH: 1 / 4}
CHANCE |= {Task.COLOURS: 0.0, Task.SHAPES: 1 / 4**4, Task.SAME: 1 / 2}


@pytest.mark.parametrize("exam", EXAMS, ids=lambda exam: exam.name)
def test_a_model_that_sees_nothing_guesses_at_best(exam: Exam, blind: Reader) -> None:
    assert measure(blind, exam, TRAINED, FEW) <= CHANCE[exam.task] + spread(CHANCE[exam.task], FEW)


def test_pictures_that_changed_places_change_the_answer(reader: Reader) -> None:
    composer = Composer(TRAINED, 6)
    pairs = [ask(Task.COLOURS, composer, composer.size(), 2).scenes for _ in range(FEW)]
    swapped = [colours(pair[::-1]) for pair in pairs]
    right = [answer == question.answer for answer, question in zip(reader.answers(swapped), swapped, strict=True)]
    assert sum(right) >= 0.95 * FEW


def test_any_picture_may_be_the_one_that_is_asked_about() -> None:
    """When it was always the first that had a shape of its own, the model learnt to answer 1."""
    tokenizer = make_tokenizer()
    lesson = study(Task.WHICH, Composer(TRAINED, 8), Writer(tokenizer), 4, 100)
    answers = [tokenizer.decode([token]) for token in lesson.tokens[:, lesson.answer].tolist()]
    assert all(10 <= answers.count(number) <= 45 for number in ("1", "2", "3", "4"))


def test_the_towers_lookout_has_something_of_everything() -> None:
    sight = lookout(Composer(TRAINED, 7), 60)
    assert set(sight.counts.tolist()) == {0, 1, 2, 3}
    assert {0, 1, 2, 3} < set(sight.places.tolist())
    assert set(range(9)) <= set(sight.colours.flatten().tolist())
    assert (sight.centres.sum(1) == sight.counts + 1).float().mean() >= 0.9  # more than two in one cell are rare
