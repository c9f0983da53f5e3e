"""The torch half of Qwen3-VL. DeepStack: the tower gives, beside a picture's embeddings, one more set of them for each
of the first layers of the language model; a row carries them all, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.qwen3_vl import modeling_qwen3_vl as library

from epdctl.engine.api import Prepared, StepInput
from epdctl.engine.families.halves import as_the_librarys_own, load_half
from epdctl.engine.families.language import MropeLanguage, load_paged
from epdctl.engine.families.qwen2_5_vl import LANGUAGE_KEYS, TOWER_KEYS, QwenTower
from epdctl.families.qwen3_vl import Qwen3VL
from epdctl.wire.config import ModelConfig

__all__ = ["load_language", "load_tower"]


@as_the_librarys_own
class _TowerHalf(library.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Without the language model."""

    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - the library's own kind of declaration

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model = None
        self.lm_head = None


@as_the_librarys_own
class _LanguageHalf(library.Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Without the tower."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.visual = None


class _DeepTower(QwenTower):
    """Implements api.Tower. A row: the embedding, then one for each DeepStack layer."""

    family = Qwen3VL

    @property
    def width(self) -> int:
        return super().width * _sets(self.module.config)

    def _rows(self, features: Any, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        deep = [_packed(each) for each in features.deepstack_features]
        together = torch.cat([torch.cat(list(features.pooler_output)), *deep], dim=1)
        return list(torch.split(together, [each.rows for each in batch]))


class _DeepLanguage(MropeLanguage):
    """Implements api.LanguageModel."""

    @property
    def row_width(self) -> int:
        return self.hidden_size * _sets(self.module.config)

    def _beside(self, step: StepInput) -> dict[str, Any]:
        if step.visual is None:
            return {}
        deep = torch.split(step.visual.beyond, self.hidden_size, dim=1)
        return {"visual_pos_masks": step.visual.mask.unsqueeze(0), "deepstack_visual_embeds": list(deep)}


def load_tower(model: ModelConfig, device: torch.device) -> QwenTower:
    return _DeepTower(model, load_half(_TowerHalf, model, attention="sdpa", other=LANGUAGE_KEYS), device)


def load_language(model: ModelConfig, device: torch.device) -> MropeLanguage:
    return _DeepLanguage(load_paged(_LanguageHalf, model, other=TOWER_KEYS), device)


def _sets(config: Any) -> int:
    """Embeddings of one placeholder."""
    return 1 + len(config.vision_config.deepstack_visual_indexes)


def _packed(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[rows of all pictures, hidden]. transformers 5.17 gives that; later ones a tensor per picture."""
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))
