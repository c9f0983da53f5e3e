"""Reads a checkpoint's json files, and says plainly what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epdctl.errors import LoadError

__all__ = [
    "read_feature_extractor",
    "read_image_processor",
    "read_json",
    "read_json_if_there",
    "read_video_processor",
]


def read_json(path: Path) -> dict[str, Any]:
    """Raises LoadError when the file is missing, unreadable or not a json object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(
            f"{path} is missing", hint="the model path must be a transformers checkpoint directory"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} is not a json object")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Empty when there is no such file."""
    return read_json(path) if path.exists() else {}


def read_image_processor(directory: Path) -> dict[str, Any]:
    """The image processor's settings. Raises LoadError when there are none."""
    return _read_processor(directory, "image_processor")


def read_feature_extractor(directory: Path) -> dict[str, Any]:
    """Those of what makes features of sound. Raises LoadError when there are none."""
    return _read_processor(directory, "feature_extractor")


def read_video_processor(directory: Path) -> dict[str, Any]:
    """Those of what makes patches of videos; where there are none of its own, pictures' are its too. May be empty."""
    nested = read_json_if_there(directory / "processor_config.json").get("video_processor")
    if isinstance(nested, dict):
        return nested
    own = directory / "video_preprocessor_config.json"
    return read_json(own) if own.exists() else read_json_if_there(directory / "preprocessor_config.json")


def _read_processor(directory: Path, name: str) -> dict[str, Any]:
    """Looked for as transformers does: newer checkpoints keep the settings of all processors in one file."""
    nested = read_json_if_there(directory / "processor_config.json").get(name)
    return nested if isinstance(nested, dict) else read_json(directory / "preprocessor_config.json")
