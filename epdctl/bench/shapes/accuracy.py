"""How often ``shapes-vl`` is wholly right: ``python -m epdctl.bench.shapes.accuracy [--pictures 500] [--json]``

Two columns: pictures drawn as in training, of another seed; and kinds of background and sizes never trained on.
Each picture of a question has a size of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from epdctl.bench.shapes.model import DIRECTORY
from epdctl.bench.shapes.questions import Question, Task, ask
from epdctl.bench.shapes.reader import Reader
from epdctl.bench.shapes.scenes import TRAINED, UNSEEN, Composer, World

__all__ = ["EXAMS", "LOSS", "Exam", "Result", "examine", "measure", "sit"]

SEED = 2_000_003  # training's first number is 0
BATCH = 50
LOSS = 0.08  # that backgrounds and sizes never seen may cost


@dataclass(frozen=True, slots=True)
class Exam:
    """``bar``: the share that must be right on pictures drawn as in training."""

    task: Task
    pictures: int
    bar: float

    @property
    def name(self) -> str:
        return f"{self.task}, {self.pictures} pictures" if self.pictures > 1 else str(self.task)


@dataclass(frozen=True, slots=True)
class Result:
    """Shares, exact match."""

    name: str
    asked: int
    trained: float
    unseen: float
    bar: float

    @property
    def met(self) -> bool:
        return self.trained >= self.bar and self.unseen >= self.trained - LOSS


EXAMS = (
    Exam(Task.COLOUR, 1, 0.98),
    Exam(Task.PLACE, 1, 0.98),
    Exam(Task.SHAPE, 1, 0.97),
    Exam(Task.COUNT, 1, 0.95),
    Exam(Task.COLOURS, 4, 0.95),
    Exam(Task.COLOURS, 8, 0.85),
    Exam(Task.WHICH, 4, 0.90),
    Exam(Task.SAME, 2, 0.90),
    Exam(Task.SHAPES, 4, 0.95),
)


def examine(reader: Reader, asked: int) -> Iterator[Result]:
    for exam in EXAMS:
        trained, unseen = (measure(reader, exam, world, asked) for world in (TRAINED, UNSEEN))
        yield Result(exam.name, asked, trained, unseen, exam.bar)


def measure(reader: Reader, exam: Exam, world: World, asked: int) -> float:
    """The share of ``asked`` questions that are answered exactly."""
    return sum(answer == question.answer for question, answer in sit(reader, exam, world, asked)) / asked


def sit(reader: Reader, exam: Exam, world: World, asked: int) -> list[tuple[Question, str]]:
    """An exam's questions with the reader's answers."""
    composer = Composer(world, (SEED, EXAMS.index(exam)))
    questions = [ask(exam.task, composer, [composer.size() for _ in range(exam.pictures)]) for _ in range(asked)]
    batches = [questions[start : start + BATCH] for start in range(0, asked, BATCH)]
    answers = [answer for batch in batches for answer in reader.answers(batch)]
    return list(zip(questions, answers, strict=True))


def _line(result: Result) -> str:
    shares = f"{result.trained:>10.1%}{result.unseen:>10.1%}{result.bar:>8.0%}"
    return f"{result.name:<22}{shares}  {'met' if result.met else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.shapes.accuracy", description="Examine shapes-vl.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DIRECTORY)
    parser.add_argument("--pictures", type=int, default=500, help="questions a task and column")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = []
    if not arguments.json:
        print(f"{'task':<22}{'as trained':>10}{'unseen':>10}{'bar':>8}")
    for result in examine(Reader(arguments.checkpoint), arguments.pictures):
        results.append(asdict(result) | {"met": result.met})
        if not arguments.json:
            print(_line(result), flush=True)
    if arguments.json:
        json.dump(results, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
