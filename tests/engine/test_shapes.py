"""``shapes-vl``: the weights are the recorded ones, load everywhere, and answer as well as was written down."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from epdctl.bench.shapes.accuracy import EXAMS, LOSS, Exam, measure, sit
from epdctl.bench.shapes.course import FIRST, SIZES, Stage
from epdctl.bench.shapes.draw import render
from epdctl.bench.shapes.lessons import Lesson, Practice, Writer, lesson, lookout, patches, study
from epdctl.bench.shapes.model import DIRECTORY, PATCH, pack
from epdctl.bench.shapes.questions import Question, Task, ask, colours
from epdctl.bench.shapes.reader import Reader
from epdctl.bench.shapes.record import RECORD, as_json, courses
from epdctl.bench.shapes.scenes import TRAINED, UNSEEN, Composer, Size, World
from epdctl.bench.shapes.student import Student
from epdctl.bench.shapes.tokens import LARGEST as LARGEST_VOCABULARY
from epdctl.bench.shapes.tokens import make_tokenizer
from epdctl.bench.shapes.train import Training
from epdctl.engine.loading import load_language, load_tower
from tests.support.checkpoints import model_config
from tests.support.swaps import Swap, swap

CPU = torch.device("cpu")
LARGEST_BYTES = 4 * 2**20
FEW, MANY = 40, 500  # questions a task
SHORT = replace(FIRST, stages=(Stage("tower", 90, (1.5e-3, 1.5e-3)),), lookout=24, warmup=20)
MIXED = replace(
    SIZES,
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


def scaled(reader: Reader, sizes: Sequence[Size]) -> set[Size]:
    """What the processor makes of pictures of these sizes."""
    seen = reader.processor(images=[Image.new("RGB", size) for size in sizes], return_tensors="pt")
    return {(PATCH * columns, PATCH * rows) for _, rows, columns in seen["image_grid_thw"].tolist()}


def test_no_size_that_is_held_out_becomes_one_that_was_trained_on(reader: Reader) -> None:
    assert scaled(reader, TRAINED.sizes) == set(TRAINED.sizes)
    assert scaled(reader, UNSEEN.sizes) == {(80, 48), (48, 80), (64, 80)}
    assert not scaled(reader, TRAINED.sizes) & scaled(reader, UNSEEN.sizes)


@pytest.mark.parametrize("size", TRAINED.sizes)
def test_patches_are_what_the_processor_makes(size: tuple[int, int], reader: Reader) -> None:
    composer = Composer(TRAINED, 3)
    pictures = [render(composer.one(size)) for _ in range(2)]
    wanted = reader.processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    torch.testing.assert_close(patches(np.stack(pictures)), wanted["pixel_values"], atol=1e-5, rtol=0)


SHOWN = [(64, 64), (48, 48), (64, 64), (96, 48)]


@pytest.mark.parametrize("rows", [[[0]], [[1, 2], [3, 0]], [[0, 1, 2, 3], [2, 3, 1, 0], [0, 2]]], ids=str)
def test_the_student_computes_what_the_library_does(rows: list[list[int]]) -> None:
    """Its attention and its batches are its own, of pictures of several sizes too; the loss must not be."""
    fresh, composer = Reader(DIRECTORY), Composer(TRAINED, 4)
    scenes = [composer.one(size) for size in SHOWN]
    questions = [colours([scenes[index] for index in row]) for row in rows]
    asked = lesson(scenes, rows, Writer(make_tokenizer()).write(questions))
    with torch.no_grad():
        logits = by_the_library(fresh, questions, asked)
        student = Student(fresh.model)
        score = student.answer([student.see(sight) for sight in asked.sights], asked)
    wanted = asked.wanted[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    assert score.loss.item() == pytest.approx(loss.item(), abs=1e-4)
    right = ((logits.argmax(-1) == wanted) | (wanted < 0)).all(1)
    assert score.right == pytest.approx(right.float().mean().item())


def by_the_library(reader: Reader, questions: list[Question], asked: Lesson) -> torch.Tensor:
    """Its own processor and its own batch; padded on the right, as the lesson is."""
    pictures = [Image.fromarray(render(scene)) for question in questions for scene in question.scenes]
    seen = reader.processor(images=pictures, return_tensors="pt")
    assert torch.equal(seen["image_grid_thw"], asked.grids)
    logits: torch.Tensor = reader.model(
        input_ids=asked.tokens,
        attention_mask=(asked.tokens != reader.tokenizer.pad_token_id).int(),
        mm_token_type_ids=(asked.tokens == reader.model.config.image_token_id).int(),
        **seen,
    ).logits
    return logits[:, :-1]


def test_a_lesson_of_several_sizes_shows_every_sequence_its_own_pictures() -> None:
    """The features of a picture are marked with its number: each sequence finds the numbers it was given."""
    composer = Composer(TRAINED, 4)
    scenes = [composer.one(size) for size in SHOWN]
    rows = [[0, 1, 2, 3], [2, 3, 1, 0]]
    made = lesson(scenes, rows, Writer(make_tokenizer()).write([colours([scenes[i] for i in row]) for row in rows]))
    assert [len(sight.grids) for sight in made.sights] == [2, 1, 1]
    marks = [0] * 16 + [2] * 16 + [1] * 9 + [3] * 18
    found = [marks[row] for row in made.shown.tolist()]
    tokens = [16, 9, 16, 18]
    assert found == [index for row in rows for index in row for _ in range(tokens[index])]


@pytest.mark.parametrize("task", Task)
def test_a_lesson_reads_as_the_chat_template_writes(task: Task, reader: Reader) -> None:
    question = ask(task, Composer(TRAINED, 5), [(64, 48), (48, 48), (48, 96)])
    written = Writer(make_tokenizer()).write([question])
    grids = torch.tensor([[1, scene.height // PATCH, scene.width // PATCH] for scene in question.scenes])
    (prompt,) = reader._prompts([question], grids)
    answer = written.wanted[0] >= 0
    assert written.tokens[0, ~answer].tolist() == reader.tokenizer(prompt)["input_ids"]
    assert reader.tokenizer.decode(written.tokens[0, answer]) == f"{question.answer}<|im_end|>"
    assert torch.equal(written.tokens[answer[None]], written.wanted[answer[None]])


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


def test_a_run_that_began_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    Training(MIXED).save(tmp_path / "state.pt")
    for other in (Training(replace(MIXED, seed=7)), Training(MIXED, DIRECTORY)):
        with pytest.raises(ValueError, match=r"begun with other (course|earlier)$"):
            other.load(tmp_path / "state.pt")
    with as_many_threads(torch.get_num_threads() + 1):
        other = Training(MIXED)
    with pytest.raises(ValueError, match=r"begun with other threads$"):
        other.load(tmp_path / "state.pt")


@contextmanager
def as_many_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def test_a_second_course_begins_from_the_first_one_s_weights_and_says_so(tmp_path: Path) -> None:
    training = Training(MIXED, DIRECTORY)
    stored = Reader(DIRECTORY).model.state_dict()
    for name, value in training.student.model.state_dict().items():
        assert torch.equal(stored[name], value), name
    training.advance()
    training.save(tmp_path / "state.pt")
    again = Training(MIXED, DIRECTORY)
    again.load(tmp_path / "state.pt")
    again.pack(tmp_path)
    *earlier, last = courses(tmp_path)
    assert earlier == courses(DIRECTORY)
    assert last["course"] == as_json(MIXED)
    assert (last["steps"], last["threads"]) == (1, torch.get_num_threads())
    assert last["versions"]["torch"] == torch.__version__


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
def test_many_pictures_are_answered_as_well_as_recorded_and_as_the_bar(
    exam: Exam, reader: Reader, record: dict[str, Any]
) -> None:
    trained, unseen = (measure(reader, exam, world, MANY) for world in (TRAINED, UNSEEN))
    assert trained >= exam.bar
    assert unseen >= trained - LOSS
    assert trained == pytest.approx(recorded(record, exam, TRAINED), abs=0.01)
    assert unseen == pytest.approx(recorded(record, exam, UNSEEN), abs=0.01)


def test_what_is_recorded_was_measured_against_the_bars(record: dict[str, Any]) -> None:
    assert {name: row["bar"] for name, row in record["accuracy"]["tasks"].items()} == {
        exam.name: exam.bar for exam in EXAMS
    }


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
@pytest.mark.parametrize("asked", [FEW, pytest.param(MANY, marks=pytest.mark.accuracy)])
def test_a_model_that_sees_nothing_guesses(asked: int, exam: Exam, blind: Reader) -> None:
    """It is right no more often than a guess, and as often as its answers would be about anybody else's pictures: it
    may have nothing to say, and so be right less often than who guesses, but may not know what to avoid."""
    questions, answers = zip(*sit(blind, exam, TRAINED, asked), strict=True)
    right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True)) / asked
    assert right <= CHANCE[exam.task] + spread(CHANCE[exam.task], asked)
    said, labels = Counter(answers), Counter(question.answer for question in questions)
    elsewhere = sum(said[answer] * labels[answer] for answer in said) / asked**2
    assert right == pytest.approx(elsewhere, abs=spread(elsewhere, asked))


@dataclass
class Swapping:
    """Of the tower's output: pictures i and j of each question change places before the language model sees them."""

    swaps: list[Swap]  # one for each question
    pictures: int  # of a question

    def __call__(self, module: object, inputs: object, output: Any) -> Any:
        rows = output.pooler_output.unflatten(0, (len(self.swaps), self.pictures, -1)).clone()
        for question, made in enumerate(self.swaps):
            rows[question, [made.i, made.j]] = rows[question, [made.j, made.i]]
        output.pooler_output = rows.flatten(0, 2)
        return output


@pytest.mark.parametrize(
    ("task", "pictures"), [(Task.COLOURS, 4), (Task.COLOURS, 8), (Task.SHAPES, 4), (Task.WHICH, 4)]
)
def test_pictures_that_changed_places_change_the_answer(task: Task, pictures: int) -> None:
    composer, fresh = Composer(TRAINED, 6), Reader(DIRECTORY)
    swaps = [swap(task, composer, [(64, 48)] * pictures) for _ in range(FEW)]
    assert len({(made.i, made.j) for made in swaps}) >= 5, "as good as any i and j"
    fresh.model.model.visual.register_forward_hook(Swapping(swaps, pictures))
    answers = fresh.answers([made.asked for made in swaps])
    right = [answer == made.answer for answer, made in zip(answers, swaps, strict=True)]
    assert sum(right) >= 0.95 * FEW


def test_any_picture_may_be_the_one_that_is_asked_about() -> None:
    """When it was always the first that had a shape of its own, the model learnt to answer 1."""
    tokenizer = make_tokenizer()
    made = study(Practice(Task.WHICH, 4, 100), Composer(TRAINED, 8), Writer(tokenizer))
    answers = [tokenizer.decode([token for token in row if token >= 0][:1]) for row in made.wanted.tolist()]
    assert all(10 <= answers.count(number) <= 45 for number in ("1", "2", "3", "4"))


def test_the_towers_lookout_has_something_of_everything() -> None:
    sight = lookout(Composer(TRAINED, 7), 60)
    assert set(sight.counts.tolist()) == {0, 1, 2, 3}
    assert {0, 1, 2, 3} < set(sight.places.tolist())
    assert set(range(9)) <= set(sight.colours.flatten().tolist())
    assert (sight.centres.sum(1) == sight.counts + 1).float().mean() >= 0.9  # more than two in one cell are rare
