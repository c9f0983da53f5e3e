"""Puts a training run's model among the package's data, with its record: ``python -m epdctl.bench.shapes.publish RUN``

The record says how it was made, of what versions, how well it answers, and what the weights' SHA-256 is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from epdctl.bench.shapes.accuracy import Result, examine
from epdctl.bench.shapes.curve import draw_curve
from epdctl.bench.shapes.model import DIRECTORY
from epdctl.bench.shapes.reader import Reader

__all__ = ["CURVE", "RECORD", "fingerprint", "publish"]

RECORD, CURVE, WEIGHTS = "training.json", "curve.png", "model.safetensors"
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")


def publish(run: Path, directory: Path, asked: int, notes: Sequence[str] = ()) -> None:
    """Replaces what is in ``directory``. ``notes``: what a later run should know of this one."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.copytree(run / "checkpoint", directory, dirs_exist_ok=True)
    draw_curve(lines).quantize(64).save(directory / CURVE, optimize=True)
    results = list(examine(Reader(directory), asked))
    record = {
        "command": "python -m epdctl.bench.shapes.train RUN --threads 2",
        "steps": lines[-1]["step"],
        "seconds": lines[-1]["seconds"],
        "sha256": fingerprint(directory),
        "notes": list(notes),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "accuracy": {"questions": asked, "tasks": _table(results)},
        "course": json.loads((run / "course.json").read_text(encoding="utf-8")),
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fingerprint(directory: Path) -> str:
    """SHA-256 of the weights' file, hex."""
    return hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()


def _table(results: Sequence[Result]) -> dict[str, Any]:
    rows = {result.name: asdict(result) | {"met": result.met} for result in results}
    return {name: {key: row[key] for key in ("trained", "unseen", "bar", "met")} for name, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.shapes.publish", description="Publish shapes-vl.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=DIRECTORY)
    parser.add_argument("--pictures", type=int, default=500, help="questions a task and column")
    parser.add_argument("--note", action="append", default=[], help="kept in the record")
    arguments = parser.parse_args()
    publish(arguments.run, arguments.to, arguments.pictures, arguments.note)


if __name__ == "__main__":
    main()
