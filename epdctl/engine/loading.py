"""Finds the torch half of a model's family. Heavy libraries come in here, and not before."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from epdctl.engine.api import LanguageModel, Tower
from epdctl.errors import LoadError
from epdctl.families import SERVED
from epdctl.wire.config import ModelConfig

__all__ = ["TorchHalf", "load_language", "load_tower", "torch_half"]


class TorchHalf(Protocol):
    """What a module of ``engine.families`` offers."""

    def load_tower(self, model: ModelConfig, device: torch.device) -> Tower: ...

    def load_language(self, model: ModelConfig, device: torch.device) -> LanguageModel: ...


def load_tower(model: ModelConfig, device: torch.device) -> Tower:
    """The encoder half, and nothing of the other. Raises LoadError."""
    return torch_half(model).load_tower(model, device)


def load_language(model: ModelConfig, device: torch.device) -> LanguageModel:
    """The language half, and nothing of the other. Raises LoadError."""
    return torch_half(model).load_language(model, device)


def torch_half(model: ModelConfig) -> TorchHalf:
    """Imports the family's module: seconds, the first time. Raises LoadError for a family we do not serve."""
    if model.family not in SERVED:
        raise LoadError(f"no model family {model.family!r}", hint=f"families: {', '.join(sorted(SERVED))}")
    return cast("TorchHalf", importlib.import_module(f"epdctl.engine.families.{model.family}"))
