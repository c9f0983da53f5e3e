"""The tiny checkpoint's two halves, each loaded by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from epdctl.engine.api import LanguageModel, Tower
from epdctl.engine.loading import load_language, load_tower
from tests.support.checkpoints import model_config, tiny_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="session")
def tower(checkpoint: Path) -> Tower:
    return load_tower(model_config(checkpoint), CPU)


@pytest.fixture(scope="session")
def language(checkpoint: Path) -> LanguageModel:
    return load_language(model_config(checkpoint), CPU)
