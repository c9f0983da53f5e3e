"""What is written down about ``shapes-vl`` is what the code says, meets its bars, and stands in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import epdctl
from epdctl.bench.shapes import record
from epdctl.bench.shapes.course import COURSES

ROOT = Path(__file__).parents[3]
DIRECTORY = Path(epdctl.__file__).parent / "data" / "shapes-vl"
ROW = re.compile(r"^\| (?P<question>[^|]+) \| [^|]* \| (?P<trained>[\d.]+)% \| (?P<unseen>[\d.]+)% \|$", re.MULTILINE)
QUESTIONS = {
    "colour": "What colour is the shape?",
    "place": "Where is the shape?",
    "shape": "What shape is it?",
    "count": "How many shapes are there? (up to 4)",
    "colours, 4 pictures": "Which colour is in each picture? (4 pictures)",
    "colours, 8 pictures": "the same, 8 pictures",
    "shapes, 4 pictures": "Which shape is in each picture? (4 pictures)",
    "which, 4 pictures": "Which picture shows the cross? (4 pictures)",
    "same, 2 pictures": "Are both pictures the same?",
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DIRECTORY / record.RECORD).read_text(encoding="utf-8"))
    return found


def test_every_course_is_the_one_of_the_code_and_was_run_to_its_end(recorded: dict[str, Any]) -> None:
    assert [part["course"] for part in recorded["courses"]] == [record.as_json(course) for course in COURSES]
    assert [part["steps"] for part in recorded["courses"]] == [course.steps for course in COURSES]


def test_the_last_course_made_the_weights_that_lie_there(recorded: dict[str, Any]) -> None:
    assert recorded["courses"][-1]["sha256"] == record.fingerprint(DIRECTORY)


def test_every_task_met_its_bar_on_many_questions(recorded: dict[str, Any]) -> None:
    assert recorded["accuracy"]["questions"] >= 500
    for name, row in recorded["accuracy"]["tasks"].items():
        assert row["met"] is True, name
        assert row["trained"] >= row["bar"], name
        assert row["unseen"] >= row["trained"] - 0.08, name


def test_the_readme_says_what_was_recorded(recorded: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {row["question"]: (row["trained"], row["unseen"]) for row in ROW.finditer(readme)}
    wanted = {
        QUESTIONS[name]: (f"{100 * row['trained']:.1f}", f"{100 * row['unseen']:.1f}")
        for name, row in recorded["accuracy"]["tasks"].items()
    }
    assert rows == wanted


def test_a_record_of_other_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    record.write(tmp_path, [{"sha256": record.fingerprint(tmp_path)}])
    assert record.courses(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="about other weights"):
        record.courses(tmp_path)
