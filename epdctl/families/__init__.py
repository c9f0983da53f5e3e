"""The model families epdctl serves, found by the ``model_type`` of a checkpoint's config.json. Free of torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from epdctl.errors import LoadError
from epdctl.families.base import Family
from epdctl.families.files import read_json
from epdctl.families.media import MediaFamily
from epdctl.ids import Modality

__all__ = ["SERVED", "modalities_of", "open_family"]

# model_type → the class of its torch-free half; the module's name is the family's
SERVED: dict[str, str] = {
    "llava_onevision": "LlavaOnevision",
    "qwen2_5_vl": "Qwen25VL",
    "qwen2_audio": "Qwen2Audio",
    "qwen3_vl": "Qwen3VL",
}


def open_family(directory: Path) -> Family:
    """Raises LoadError for a directory without a readable config.json, and for a family we do not serve."""
    model_type = read_json(directory / "config.json").get("model_type")
    if not isinstance(model_type, str) or model_type not in SERVED:
        raise LoadError(
            f"{directory} is a model of type {model_type!r}, which is not served",
            hint=f"served: {', '.join(sorted(SERVED))}",
        )
    family: Family = _class(model_type)(directory)
    return family


def modalities_of(model_type: str) -> Sequence[Modality]:
    """What models of a served family take beside text; what a checkpoint of it says may add to that."""
    return tuple(_class(model_type).placeholders)


def _class(model_type: str) -> type[MediaFamily]:
    module = importlib.import_module(f"epdctl.families.{model_type}")
    found: type[MediaFamily] = getattr(module, SERVED[model_type])
    return found
