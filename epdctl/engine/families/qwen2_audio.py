"""The torch half of Qwen2-Audio: its tower over clips packed behind each other, and its language model over KV pages.

transformers lays every clip on 30 s and masks what is not sound; here only what is sound goes through the tower, which
gives the same: a position looks at no masked one, and the convolutions in front see two frames beyond the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from transformers.models.qwen2_audio import modeling_qwen2_audio as library

from epdctl.engine.api import Prepared
from epdctl.engine.families.halves import as_the_librarys_own, load_half, load_refusals
from epdctl.engine.families.language import PlainLanguage, load_paged
from epdctl.engine.families.sounds import hear
from epdctl.engine.varlen import packed_attention
from epdctl.errors import LoadError
from epdctl.families.qwen2_audio import Qwen2Audio, positions, rows
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem

__all__ = ["load_language", "load_tower"]

_TOWER_KEYS = ("audio_tower.", "multi_modal_projector.", "model.audio_tower.", "model.multi_modal_projector.")
_LANGUAGE_KEYS = ("lm_head.", "language_model.", "model.language_model.")


@as_the_librarys_own
class _TowerHalf(library.Qwen2AudioForConditionalGeneration):  # type: ignore[misc]
    """Without the language model."""

    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - the library's own kind of declaration

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model = None
        self.lm_head = None


@as_the_librarys_own
class _LanguageHalf(library.Qwen2AudioForConditionalGeneration):  # type: ignore[misc]
    """Without the tower, and without what stands between them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.audio_tower = None
        self.model.multi_modal_projector = None


class _Tower:
    """Implements api.Tower. ``Prepared.pixels``: [mel bands, frames], of the clip's sound and two frames beyond."""

    def __init__(self, model: ModelConfig, module: Any, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self._family = Qwen2Audio(Path(model.path))
        self._extractor = _load_extractor(model)
        self._audio = module.model.audio_tower
        self._audio.config._attn_implementation = packed_attention(model.attention, device, self.dtype)
        expected = 2 * int(self._audio.config.max_source_positions)
        if self._family.rule.most_frames != expected:
            text = f"makes {self._family.rule.most_frames} frames of a clip, and its tower takes {expected}"
            raise LoadError(f"the feature extractor of {model.path} {text}")

    @property
    def width(self) -> int:
        return int(self.module.config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return cast("torch.dtype", self.module.dtype)

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        rule = self._family.rule
        samples = hear(media, item, self._family)
        frames = rule.frames(len(samples))
        features = self._extractor(samples, sampling_rate=rule.rate, return_tensors="pt")["input_features"][0]
        kept = positions(frames)
        seen = features[:, : 2 * kept + 1].clone()
        return Prepared(grid=(1, 1, frames), rows=rows(frames), patches=kept, pixels=seen)

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        lengths = [each.patches for each in batch]
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
        packing = {"cu_seq_lens_q": borders, "max_length_q": max(lengths)}
        with torch.inference_mode():
            hidden = torch.cat([self._positions(each) for each in batch]).unsqueeze(0)
            for layer in self._audio.layers:
                hidden = layer(hidden, None, **packing)
            pairs = [self._audio.avg_pooler(each.T).T for each in torch.split(hidden[0], lengths)]
            found = self.module.model.multi_modal_projector(self._audio.layer_norm(torch.cat(pairs)))
        return list(torch.split(found, [each.rows for each in batch]))

    def _positions(self, clip: Prepared) -> torch.Tensor:
        """[positions, hidden] of one clip, as its layers begin with them."""
        gelu = torch.nn.functional.gelu
        seen = gelu(self._audio.conv1(clip.pixels.to(self.device, self.dtype)))
        found = gelu(self._audio.conv2(seen))[:, : clip.patches].T
        return cast("torch.Tensor", found + self._audio.embed_positions.weight[: clip.patches])


def load_tower(model: ModelConfig, device: torch.device) -> _Tower:
    return _Tower(model, load_half(_TowerHalf, model, attention="sdpa", other=_LANGUAGE_KEYS), device)


def load_language(model: ModelConfig, device: torch.device) -> PlainLanguage:
    return PlainLanguage(load_paged(_LanguageHalf, model, other=_TOWER_KEYS), device)


def _load_extractor(model: ModelConfig) -> Any:
    from transformers import WhisperFeatureExtractor

    with load_refusals(Path(model.path)):
        return WhisperFeatureExtractor.from_pretrained(model.path, local_files_only=True)
