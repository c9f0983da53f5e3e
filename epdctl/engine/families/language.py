"""A family's language half over KV pages: what the families have in common, and M-RoPE for those that have it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch

from epdctl.engine.api import StepInput
from epdctl.engine.attention import PAGED, register
from epdctl.engine.families.halves import load_half
from epdctl.engine.wide import sums_are_wide, widen
from epdctl.errors import LoadError, RequestError
from epdctl.ids import Modality
from epdctl.wire.config import ModelConfig
from epdctl.wire.serve import KvLayout, PromptItem

__all__ = ["MropeLanguage", "PagedLanguage", "PlainLanguage", "load_paged"]


class PagedLanguage(ABC):
    """Implements api.LanguageModel, but for positions. ``module``: transformers' whole model without its tower."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self._text = module.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        return int(self._text.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self._text.hidden_size)

    @property
    def row_width(self) -> int:
        return self.hidden_size

    def layout(self, page_size: int) -> KvLayout:
        return KvLayout(
            page_size=page_size,
            layers=self._text.num_hidden_layers,
            kv_heads=self._text.num_key_value_heads,
            head_dim=getattr(self._text, "head_dim", None) or self.hidden_size // self._text.num_attention_heads,
            dtype=str(self.module.dtype).removeprefix("torch."),
        )

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
            return cast("torch.Tensor", self.module.get_input_embeddings()(ids))

    @abstractmethod
    def positions(self, tokens: Sequence[int], items: Sequence[PromptItem]) -> tuple[torch.Tensor, int]: ...

    def forward(self, step: StepInput) -> torch.Tensor:
        with torch.inference_mode():
            hidden = self.module.model.language_model(
                inputs_embeds=step.embeds.unsqueeze(0),
                position_ids=self._angles(step.positions),
                attention_mask={"full_attention": None},  # said, so that no mask is made that nobody reads
                use_cache=False,
                paged=step.paged,
                **self._beside(step),
            ).last_hidden_state
            return cast("torch.Tensor", self.module.lm_head(hidden[0, step.wanted]).float())

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """As transformers takes them, from [3, tokens]: here [3, 1, tokens]."""
        return positions.unsqueeze(1)

    def _beside(self, step: StepInput) -> dict[str, Any]:
        """What else the family's model is told."""
        return {}


class PlainLanguage(PagedLanguage):
    """A token's angle is its index, thrice."""

    def positions(self, tokens: Sequence[int], items: Sequence[PromptItem]) -> tuple[torch.Tensor, int]:
        return torch.arange(len(tokens), dtype=torch.int64).expand(3, -1), 0

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """[1, tokens]."""
        return positions[:1]


class MropeLanguage(PagedLanguage):
    """Positions of time, height and width, from grids of (t, h, w) in patches."""

    def positions(self, tokens: Sequence[int], items: Sequence[PromptItem]) -> tuple[torch.Tensor, int]:
        kinds = torch.zeros(1, len(tokens), dtype=torch.int32)
        for item in items:
            kinds[0, item.offset : item.offset + item.rows] = _KINDS[item.modality]
        try:
            found, _ = self.module.model.get_rope_index(
                torch.tensor([tokens], dtype=torch.int64), mm_token_type_ids=kinds, **_grids(items)
            )
        except (RuntimeError, StopIteration) as error:  # two items without a token between them, or a wrong length
            raise RequestError(400, f"the prompt's items do not fit its tokens: {error}") from error
        behind = int(found[:, 0, -1].max()) + 1  # as generate goes on: a video's time may be further than all behind it
        return found[:, 0], behind - len(tokens)


_KINDS = {Modality.IMAGE: 1, Modality.VIDEO: 2}  # transformers' mm_token_type_ids


def _grids(items: Sequence[PromptItem]) -> dict[str, torch.Tensor]:
    """As transformers' processors give them, each kind's in the prompt's order."""
    pictures, videos = ([item for item in items if item.modality is kind] for kind in _KINDS)
    found = {"image_grid_thw": torch.tensor([item.grid for item in pictures], dtype=torch.int64)}
    if videos:
        found["video_grid_thw"] = torch.tensor([item.grid for item in videos], dtype=torch.int64)
        found["second_per_grid_ts"] = torch.tensor([item.seconds for item in videos])
    return found


def load_paged(half: type[Any], model: ModelConfig, *, other: Sequence[str]) -> Any:
    """``load_half`` with attention over pages, widened where the plan says so. Raises LoadError, also for a model that
    needs more than that."""
    wide = sums_are_wide(model)
    register()
    module = load_half(half, model, attention=PAGED, other=other)
    if "sliding_attention" in (getattr(module.config.get_text_config(), "layer_types", None) or ()):
        raise LoadError(f"{model.path} uses sliding-window attention, which the paged attention does not have")
    if wide:
        widen(module)
    return module
