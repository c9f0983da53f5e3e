"""One tiny checkpoint per test session, made once and shared by all that ask for it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from epdctl.bench.checkpoints import FAMILY, make_checkpoint
from epdctl.wire.config import ModelConfig

__all__ = ["NEWER", "every_family", "model_config", "tiny_checkpoint"]

NEWER = ("qwen3_vl", "llava_onevision")  # the families beside Qwen2.5-VL

# On a test that takes the fixture ``checkpoint``: once with each family's.
every_family = pytest.mark.parametrize("checkpoint", [FAMILY, *NEWER], indirect=True, scope="session")


def tiny_checkpoint(factory: pytest.TempPathFactory, seed: int = 0, family: str = FAMILY) -> Path:
    """The directory, under the session's temporary one; the same for everybody who asks with the same words."""
    return _made(factory.getbasetemp(), seed, family)


@cache
def _made(base: Path, seed: int, family: str) -> Path:
    return make_checkpoint(base / f"tiny-{family}-{seed}", seed=seed, family=family)


def model_config(directory: Path, **changes: str) -> ModelConfig:
    """Of what the directory holds; float32 on the CPU, where answers are exact."""
    family = _family(directory)
    return ModelConfig(**{"path": str(directory), "name": "tiny", "family": family, **changes})


def _family(directory: Path) -> str:
    """Qwen2.5-VL too where nobody can say: tests of broken checkpoints."""
    try:
        return str(json.loads((directory / "config.json").read_text())["model_type"])
    except (OSError, ValueError):
        return FAMILY
