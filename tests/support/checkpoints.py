"""One tiny checkpoint per test session, made once and shared by all that ask for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from epdctl.bench.checkpoints import make_checkpoint
from epdctl.wire.config import ModelConfig

__all__ = ["model_config", "tiny_checkpoint"]


def tiny_checkpoint(factory: pytest.TempPathFactory, seed: int = 0) -> Path:
    """The directory, under the session's temporary one; the same for everybody who asks with the same seed."""
    return _made(factory.getbasetemp(), seed)


@cache
def _made(base: Path, seed: int) -> Path:
    return make_checkpoint(base / f"tiny-{seed}", seed=seed)


def model_config(directory: Path, **changes: str) -> ModelConfig:
    """Float32 on the CPU, where answers are exact."""
    return ModelConfig(**{"path": str(directory), "name": "tiny", "family": "qwen2_5_vl", **changes})
