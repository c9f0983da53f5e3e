"""Batches to train on: questions about pictures of one or several sizes, and what the tower alone should see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from epdctl.bench.shapes.draw import Colour, Place, Scene, Shape, coverage, render
from epdctl.bench.shapes.model import MEAN, MERGE, PATCH, STD
from epdctl.bench.shapes.questions import Question, Task, ask, colours, shapes, which
from epdctl.bench.shapes.scenes import COUNTS, Composer

__all__ = ["IGNORED", "MOST_CENTRES", "Lesson", "Practice", "Sight", "Writer", "look", "lookout", "patches", "study"]

IGNORED = -100  # as cross_entropy has it
CELL = PATCH * MERGE
SEEN, UNSEEN = 0.2, 0.04  # shares of a cell from which, and up to which, a figure is called there, or not
MOST_CENTRES = 2  # figures do not touch: more do not fit into a cell
LAYOUTS = 1024  # that are remembered
COLOURS, SHAPES, PLACES = list(Colour), list(Shape), list(Place)


@dataclass(frozen=True, slots=True)
class Sight:
    """Pictures of one size, and what is in them. Classes are int64; IGNORED is where there is no telling."""

    pixels: torch.Tensor  # [pictures * patches, values]
    grids: torch.Tensor  # [pictures, 3]
    colours: torch.Tensor  # [pictures, tokens]: 0 is background
    shapes: torch.Tensor  # [pictures, tokens]: IGNORED is background
    centres: torch.Tensor  # [pictures, tokens]: how many figures have their middle there, at most MOST_CENTRES
    counts: torch.Tensor  # [pictures]
    places: torch.Tensor  # [pictures]


@dataclass(frozen=True, slots=True)
class Lesson:
    """Sequences over some pictures. ``shown``: the rows of the sights' features, one after the other, that take the
    places of the image tokens. ``grids``: of the pictures of each sequence, in order."""

    sights: tuple[Sight, ...]
    shown: torch.Tensor  # [image tokens of all sequences]
    grids: torch.Tensor  # [pictures of all sequences, 3]
    tokens: torch.Tensor  # [sequences, length], answers and their end included, padded on the right
    wanted: torch.Tensor  # [sequences, length]: the tokens of the answers, IGNORED elsewhere


@dataclass(frozen=True, slots=True)
class Practice:
    """What a lesson is about. ``mixed``: the probability that its pictures are of several sizes."""

    task: Task
    pictures: int
    sequences: int
    mixed: float = 0.0


def study(practice: Practice, composer: Composer, writer: Writer) -> Lesson:
    """Questions of several pictures share them: a picture is worth many questions, and drawing and seeing cost most."""
    palette = composer.palette(practice.mixed)
    if practice.task in _PICK:
        scenes = [composer.one(size) for size in composer.sizes(palette, max(16, 2 * practice.pictures))]
        pick = _PICK[practice.task]
        picked = [pick(scenes, composer.rng, practice.pictures) for _ in range(practice.sequences)]
        rows, questions = [row for row, _ in picked], [question for _, question in picked]
    else:
        questions = [ask(practice.task, composer, composer.sizes(palette, 2)) for _ in range(practice.sequences)]
        scenes = [scene for question in questions for scene in question.scenes]
        rows = np.arange(len(scenes)).reshape(practice.sequences, -1).tolist()
    return lesson(scenes, rows, writer.write(questions))


def lesson(scenes: Sequence[Scene], rows: Sequence[Sequence[int]], written: Written) -> Lesson:
    """``rows[i]`` are the scenes of sequence i, in order."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, scene in enumerate(scenes):
        groups.setdefault((scene.width, scene.height), []).append(index)
    order = [index for group in groups.values() for index in group]
    ends = np.cumsum([_tokens(scenes[index]) for index in order])
    features = {index: range(end - _tokens(scenes[index]), end) for index, end in zip(order, ends, strict=True)}
    shown = [index for row in rows for index in row]
    return Lesson(
        sights=tuple(look([scenes[index] for index in group]) for group in groups.values()),
        shown=torch.tensor([place for index in shown for place in features[index]]),
        grids=torch.tensor([_grid(scenes[index]) for index in shown]),
        tokens=written.tokens,
        wanted=written.wanted,
    )


def lookout(composer: Composer, pictures: int) -> Sight:
    """For the tower alone: single figures anywhere, single ones at a side, several."""
    size = composer.size()
    scenes = [
        (composer.one(size), composer.placed(size), composer.several(size, int(composer.rng.choice(COUNTS))))[index % 3]
        for index in range(pictures)
    ]
    return look(scenes)


def look(scenes: Sequence[Scene]) -> Sight:
    (grid,) = {_grid(scene) for scene in scenes}
    hues, forms = zip(*map(_cells, scenes), strict=True)
    return Sight(
        pixels=patches(np.stack([render(scene) for scene in scenes])),
        grids=torch.tensor([grid] * len(scenes)),
        colours=torch.from_numpy(np.stack(hues)),
        shapes=torch.from_numpy(np.stack(forms)),
        centres=torch.from_numpy(np.stack([_centres(scene) for scene in scenes])),
        counts=torch.tensor([len(scene.figures) - 1 for scene in scenes]),
        places=torch.tensor([IGNORED if scene.place is None else PLACES.index(scene.place) for scene in scenes]),
    )


def patches(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """[pictures, height, width, 3] to what the family's processor gives for them, where it need not scale."""
    many, height, width, _ = pictures.shape
    values = (torch.from_numpy(pictures).float() / 255 - MEAN) / STD
    rows, columns = height // CELL, width // CELL
    cut = values.reshape(many, rows, MERGE, PATCH, columns, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    twice = cut.unsqueeze(6).expand(*cut.shape[:6], 2, PATCH, PATCH)  # a still picture is two frames
    return twice.reshape(many * rows * columns * MERGE * MERGE, -1)


_Picked = tuple[list[int], Question]


def _pick_colours(scenes: Sequence[Scene], rng: np.random.Generator, pictures: int) -> _Picked:
    row = _row(scenes, rng, pictures)
    return row, colours([scenes[index] for index in row])


def _pick_shapes(scenes: Sequence[Scene], rng: np.random.Generator, pictures: int) -> _Picked:
    row = _row(scenes, rng, pictures)
    return row, shapes([scenes[index] for index in row])


def _row(scenes: Sequence[Scene], rng: np.random.Generator, pictures: int) -> list[int]:
    return [int(index) for index in rng.choice(len(scenes), pictures, replace=False)]


def _pick_which(scenes: Sequence[Scene], rng: np.random.Generator, pictures: int) -> _Picked:
    """Any of them may be the one that is asked about: what were always the first would be learnt as such."""
    target = int(rng.integers(len(scenes)))
    others = [index for index, scene in enumerate(scenes) if _shape(scene) is not _shape(scenes[target])]
    row = [int(index) for index in rng.choice(others, pictures - 1, replace=len(others) < pictures)]
    row.insert(int(rng.integers(pictures)), target)
    return row, which([scenes[index] for index in row], _shape(scenes[target]))


_PICK: Mapping[Task, Callable[[Sequence[Scene], np.random.Generator, int], _Picked]] = {
    Task.COLOURS: _pick_colours,
    Task.SHAPES: _pick_shapes,
    Task.WHICH: _pick_which,
}


def _shape(scene: Scene) -> Shape:
    return scene.figures[0].shape


def _centres(scene: Scene) -> NDArray[np.int64]:
    """Per token of the picture. What tells one figure from two is where their middles are, not what they cover."""
    found = np.zeros((scene.height // CELL, scene.width // CELL), np.int64)
    for figure in scene.figures:
        found[int(figure.y) // CELL, int(figure.x) // CELL] += 1
    return found.ravel().clip(max=MOST_CENTRES)


def _cells(scene: Scene) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per token of the picture: the colour and the shape of the figure that covers most of it."""
    rows, columns = scene.height // CELL, scene.width // CELL
    shares = np.stack([it.reshape(rows, CELL, columns, CELL).mean((1, 3)).ravel() for it in coverage(scene)])
    most, share = shares.argmax(0), shares.max(0)
    colours = np.array([COLOURS.index(figure.colour) for figure in scene.figures])[most] + 1
    shapes = np.array([SHAPES.index(figure.shape) for figure in scene.figures])[most]
    elsewhere = np.where(share > UNSEEN, IGNORED, 0)
    return np.where(share >= SEEN, colours, elsewhere), np.where(share >= SEEN, shapes, IGNORED)


@dataclass(frozen=True, slots=True)
class Written:
    """As of a Lesson."""

    tokens: torch.Tensor
    wanted: torch.Tensor


class Writer:
    """Questions as token ids, in the frame that the chat template gives them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._padding = tokenizer.get_vocab()["<|endoftext|>"]
        self.prompt = lru_cache(LAYOUTS)(self._prompt)

    def write(self, questions: Sequence[Question]) -> Written:
        prompts = [self.prompt(question.prompt, tuple(map(_tokens, question.scenes))) for question in questions]
        answers = [self._tokenizer.encode(f"{question.answer}<|im_end|>").ids for question in questions]
        pairs = list(zip(prompts, answers, strict=True))
        return Written(
            tokens=_padded([prompt + answer for prompt, answer in pairs], self._padding),
            wanted=_padded([[IGNORED] * len(prompt) + answer for prompt, answer in pairs], IGNORED),
        )

    def _prompt(self, prompt: str, rows: tuple[int, ...]) -> list[int]:
        pictures = (
            f"Picture {number}: <|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
            for number, tokens in enumerate(rows, 1)
        )
        text = f"<|im_start|>user\n{''.join(pictures)}{prompt}<|im_end|>\n<|im_start|>assistant\n"
        return self._tokenizer.encode(text).ids


def _padded(rows: Sequence[list[int]], padding: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [padding] * (longest - len(row)) for row in rows])


def _tokens(scene: Scene) -> int:
    return (scene.height // CELL) * (scene.width // CELL)


def _grid(scene: Scene) -> tuple[int, int, int]:
    return 1, scene.height // PATCH, scene.width // PATCH
