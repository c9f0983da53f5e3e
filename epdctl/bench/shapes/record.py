"""How weights were made: the record that stands beside them, one part for each course they went through."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from epdctl.bench.shapes.course import Course

__all__ = ["RECORD", "Part", "as_json", "begun", "courses", "fingerprint", "write"]

RECORD, WEIGHTS = "training.json", "model.safetensors"
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
Part = dict[str, Any]


def begun(course: Course, threads: int) -> Part:
    """What decides about the weights, beside those that the course begins from."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    return {"threads": threads, "versions": versions, "course": as_json(course)}


def as_json(course: Course) -> dict[str, Any]:
    """As a record has it: lists, and plain strings for tasks."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(course)))
    return found


def courses(directory: Path) -> list[Part]:
    """What the weights of a checkpoint went through. Raises ValueError when its last part is about other weights."""
    parts: list[Part] = json.loads((directory / RECORD).read_text(encoding="utf-8"))["courses"]
    if parts[-1]["sha256"] != fingerprint(directory):
        raise ValueError(f"{directory / RECORD} is about other weights than those beside it")
    return parts


def write(directory: Path, parts: list[Part], **more: object) -> None:
    record = {"courses": parts, **more}
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fingerprint(directory: Path) -> str:
    """SHA-256 of the weights' file, hex."""
    return hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()
