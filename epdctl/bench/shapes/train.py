"""Trains ``shapes-vl`` on the CPU, from pictures it draws, in courses that follow each other:

``python -m epdctl.bench.shapes.train RUN`` from nothing, then ``... RUN2 --from RUN/checkpoint`` for the next one.

RUN is a folder for the log and for what a later call goes on from. Equal courses, threads, versions and first weights
give equal weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from epdctl.bench.shapes import record
from epdctl.bench.shapes.course import COURSES, Course, Progress, Stage
from epdctl.bench.shapes.lessons import Practice, Writer, lookout, study
from epdctl.bench.shapes.model import build, pack, weights
from epdctl.bench.shapes.questions import Task
from epdctl.bench.shapes.scenes import Composer
from epdctl.bench.shapes.student import Student
from epdctl.bench.shapes.tokens import make_tokenizer

__all__ = ["Training"]

SAVED = 250  # steps between two states on disk
LOGGED = 25  # steps to a line of the log


class Training:
    """One run: the student, its optimiser, how far it has come."""

    def __init__(self, course: Course, first: Path | None = None) -> None:
        """``first``: a checkpoint whose weights are gone on from; the heads beside them are new."""
        self.course = course
        self.begun = record.begun(course, torch.get_num_threads())
        self.earlier = record.courses(first) if first else []
        self.tokenizer = make_tokenizer()
        self.student = Student(build(self.tokenizer, course.seed))
        if first:
            self.student.model.load_state_dict(weights(first))
        self.average = copy.deepcopy(self.student)
        self.step = 0
        self.seconds = 0.0
        self._progress = Progress()
        self._writer = Writer(self.tokenizer)
        self._optimizer = torch.optim.AdamW(
            self.student.parameters(), betas=(0.9, 0.98), weight_decay=course.weight_decay, fused=True
        )

    def advance(self) -> dict[str, float]:
        """One step. Returns losses and shares of right answers, by what was practised."""
        stage, rate = self.course.stage(self.step)
        composer = Composer(self.course.world, (self.course.seed, self.step))
        seen: dict[str, float] = {}
        if stage.tasks:
            tasks, weights = list(stage.tasks), torch.tensor(list(stage.tasks.values())).double().numpy()
            for chosen in composer.rng.choice(len(tasks), self.course.lessons, p=weights / weights.sum()):
                seen |= self._practise(tasks[chosen], stage, composer)
        else:
            seen |= self._look(composer)
        self._learn(rate)
        self.step += 1
        return seen

    def _look(self, composer: Composer) -> dict[str, float]:
        sight = lookout(composer, self.course.lookout)
        score = self.student.describe([self.student.see(sight)], [sight])
        torch.autograd.backward(score.loss)
        return {"tower loss": float(score.loss.detach()), "tower": score.right}

    def _practise(self, task: Task, stage: Stage, composer: Composer) -> dict[str, float]:
        pictures = self._progress.pictures(self.course.levels, task, stage.learnt, composer.rng)
        practice = Practice(task, pictures, self.course.sequences_of(pictures), self.course.mixed)
        lesson = study(practice, composer, self._writer)
        features = [self.student.see(sight) for sight in lesson.sights]
        described = self.student.describe(features, lesson.sights)
        answered = self.student.answer(features, lesson)
        loss = answered.loss + self.course.describing * described.loss
        torch.autograd.backward(loss / self.course.lessons)
        self._progress.note(task, pictures, answered.right)
        name = f"{task} {pictures}"
        return {"tower": described.right, f"{name} loss": float(answered.loss.detach()), name: answered.right}

    def _learn(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.course.longest_gradient)
        self._optimizer.step()
        self._optimizer.zero_grad()
        slow = min(self.course.average, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - slow)

    def save(self, path: Path) -> None:
        state = {
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "right": self._progress.right,
            "begun": self.begun,
            "earlier": self.earlier,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Raises ValueError when the state is of a run that began otherwise: the two would be recorded as one."""
        state = torch.load(path, weights_only=True)
        mine = self.begun | {"earlier": self.earlier}
        differs = [
            name for name, value in (state["begun"] | {"earlier": state["earlier"]}).items() if value != mine[name]
        ]
        if differs:
            raise ValueError(f"{path} cannot be gone on from: it was begun with other {', '.join(differs)}")
        self.student.load_state_dict(state["student"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._progress = Progress(state["right"])

    def pack(self, directory: Path) -> None:
        """The checkpoint, with the record of how it was made."""
        pack(directory, self.tokenizer, self.average.model)
        done = {"steps": self.step, "seconds": round(self.seconds), "sha256": record.fingerprint(directory)}
        record.write(directory, [*self.earlier, done | self.begun])


def run(folder: Path, training: Training, say: Callable[[str], None]) -> None:
    """Goes on from where the folder's last call was, to the end of the course."""
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.pt"
    if state.exists():
        training.load(state)
    before = time.monotonic() - training.seconds
    lines: list[dict[str, float]] = []
    while training.step < training.course.steps:
        lines.append(training.advance())
        training.seconds = time.monotonic() - before
        if training.step % LOGGED == 0:
            _log(folder / "log.jsonl", training, _means(lines), say)
            lines.clear()
        if training.step % SAVED == 0 or training.step == training.course.steps:
            training.save(state)
            training.pack(folder / "checkpoint")


def _means(lines: list[dict[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            found.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(found.items())}


def _log(path: Path, training: Training, means: dict[str, float], say: Callable[[str], None]) -> None:
    stage, rate = training.course.stage(training.step - 1)
    line = {"step": training.step, "seconds": round(training.seconds), "stage": stage.name, "rate": rate, **means}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    say(f"{training.step:6} {line['seconds']:6} s {stage.name:8} " + "  ".join(f"{k} {v}" for k, v in means.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.shapes.train", description="Train shapes-vl.")
    parser.add_argument("run", type=Path, help="folder for the log, the state and the checkpoint")
    parser.add_argument("--from", type=Path, dest="first", help="a checkpoint of the course before")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    done = len(record.courses(arguments.first)) if arguments.first else 0
    if done == len(COURSES):
        parser.error(f"{arguments.first} has been through all {done} courses")
    run(arguments.run, Training(COURSES[done], arguments.first), lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
