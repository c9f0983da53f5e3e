"""The torch half of Qwen2.5-VL: its tower, and its language model over KV pages. Qwen3-VL's builds on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

from epdctl.engine.api import LoadProgress, Prepared
from epdctl.engine.families.fast import optimized
from epdctl.engine.families.halves import as_the_librarys_own, load_half
from epdctl.engine.families.language import MropeLanguage, load_paged
from epdctl.engine.families.pictures import check_grid, load_processor, open_picture
from epdctl.engine.families.videos import Videos
from epdctl.engine.varlen import tower_attention
from epdctl.families.qwen2_5_vl import Qwen25VL
from epdctl.ids import Modality
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem

__all__ = ["LANGUAGE_KEYS", "TOWER_KEYS", "QwenTower", "load_language", "load_tower"]

TOWER_KEYS = ("visual.", "model.visual.")
LANGUAGE_KEYS = ("lm_head.", "model.language_model.", "model.embed_tokens.", "model.layers.", "model.norm.")


@as_the_librarys_own
class _TowerHalf(library.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Without the language model."""

    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - the library's own kind of declaration

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model = None
        self.lm_head = None


@as_the_librarys_own
class _LanguageHalf(library.Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Without the tower."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.visual = None


class QwenTower:
    """Implements api.Tower."""

    family: ClassVar[type[Qwen25VL]] = Qwen25VL

    def __init__(self, model: ModelConfig, module: Any, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self._family = self.family(Path(model.path))
        self._videos = Videos(model, self._family)
        self._processor = load_processor(model, {"pil": _pil_processor, "torchvision": _torchvision_processor})
        visual = module.model.visual
        visual.config._attn_implementation = tower_attention(model.attention, device, self.dtype)
        self._fast = optimized(model, visual, self._processor)

    @property
    def width(self) -> int:
        return int(self.module.config.vision_config.out_hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return cast("torch.dtype", self.module.dtype)

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        if item.modality is Modality.VIDEO:
            return self._videos.prepare(media, item)
        picture = open_picture(media, item, self._family)
        if self._fast is not None and self._fast.pictures is not None:
            check_grid(item, self._family.picture_tokens(*picture.size, item.of).grid)
            return self._fast.prepare(picture, item)
        values = self._processor(images=[picture], return_tensors="pt")
        pixels, (grid,) = values["pixel_values"], values["image_grid_thw"].tolist()
        check_grid(item, grid)
        return Prepared(grid=tuple(grid), rows=item.rows, patches=pixels.shape[0], pixels=pixels)

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        if self._fast is not None:
            return self._fast.encode(batch)
        pixels = torch.cat([each.pixels for each in batch]).to(self.device)
        grids = torch.tensor([each.grid for each in batch], dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            return self._rows(self.module.model.get_image_features(pixels, grids, return_dict=True), batch)

    def warm_up(self, progress: LoadProgress) -> None:
        if self._fast is not None:
            self._fast.tower.warm_up(progress)

    def _rows(self, features: Any, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """[rows, width] per picture, of what transformers calls its features."""
        return list(features.pooler_output)


def load_tower(model: ModelConfig, device: torch.device) -> QwenTower:
    return QwenTower(model, load_half(_TowerHalf, model, attention="sdpa", other=LANGUAGE_KEYS), device)


def load_language(model: ModelConfig, device: torch.device) -> MropeLanguage:
    return MropeLanguage(load_paged(_LanguageHalf, model, other=TOWER_KEYS), device)


def _pil_processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


def _torchvision_processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor
