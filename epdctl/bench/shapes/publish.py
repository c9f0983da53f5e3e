"""Puts a training run's model among the package's data, with its record: ``python -m epdctl.bench.shapes.publish RUN``

The record says how it was made, as the run itself wrote it down, and how well it answers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epdctl.bench.shapes import record
from epdctl.bench.shapes.accuracy import Result, examine
from epdctl.bench.shapes.curve import draw_curve
from epdctl.bench.shapes.model import DIRECTORY
from epdctl.bench.shapes.reader import Reader

__all__ = ["publish"]


def publish(run: Path, directory: Path, asked: int) -> None:
    """Replaces what is in ``directory``; the curves of earlier courses stay."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.copytree(run / "checkpoint", directory, dirs_exist_ok=True)
    courses = record.courses(directory)
    draw_curve(lines).quantize(64).save(directory / f"curve-{len(courses)}.png", optimize=True)
    results = list(examine(Reader(directory), asked))
    accuracy = {"questions": asked, "tasks": _table(results)}
    record.write(directory, courses, accuracy=accuracy)


def _table(results: Sequence[Result]) -> dict[str, Any]:
    rows = {result.name: asdict(result) | {"met": result.met} for result in results}
    return {name: {key: row[key] for key in ("trained", "unseen", "bar", "met")} for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.shapes.publish", description="Publish shapes-vl.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=DIRECTORY)
    parser.add_argument("--pictures", type=int, default=500, help="questions a task and column")
    arguments = parser.parse_args()
    publish(arguments.run, arguments.to, arguments.pictures)


if __name__ == "__main__":
    main()
