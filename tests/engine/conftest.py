"""A tiny checkpoint's two halves, each loaded by itself: Qwen2.5-VL's, or the family's that a test is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epdctl.bench.checkpoints import FAMILY
from epdctl.engine.api import LanguageModel, Tower
from epdctl.engine.loading import load_language, load_tower
from tests.support.checkpoints import model_config, tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory, family=getattr(request, "param", FAMILY))


@pytest.fixture(scope="session")
def tower(checkpoint: Path) -> Tower:
    return load_tower(model_config(checkpoint), CPU)


@pytest.fixture(scope="session")
def language(checkpoint: Path) -> LanguageModel:
    return load_language(model_config(checkpoint), CPU)
