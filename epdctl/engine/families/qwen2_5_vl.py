"""The torch half of Qwen2.5-VL: its tower, and its language model over KV pages."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

from epdctl.engine.api import Prepared, StepInput
from epdctl.engine.attention import PAGED, register
from epdctl.engine.families.halves import as_the_librarys_own, load_half, load_refusals
from epdctl.engine.varlen import tower_attention
from epdctl.errors import LoadError, RequestError
from epdctl.families.qwen2_5_vl import Qwen25VL
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem
from epdctl.wire.serve import KvLayout, PromptItem

__all__ = ["load_language", "load_tower"]

_TOWER_KEYS = ("visual.", "model.visual.")
_LANGUAGE_KEYS = ("lm_head.", "model.language_model.", "model.embed_tokens.", "model.layers.", "model.norm.")

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow knows more, and some of them start other programs

# What Pillow raises over bytes that are no picture, or half of one.
_BROKEN = (OSError, SyntaxError, ValueError, IndexError, KeyError, EOFError, struct.error, Image.DecompressionBombError)


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


class Tower:
    """Implements api.Tower. A picture's alpha is dropped; one whose EXIF says that it lies on its side is turned."""

    def __init__(self, model: ModelConfig, module: Any, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self._family = Qwen25VL(Path(model.path))
        self._processor = _image_processor(model)

    @property
    def width(self) -> int:
        return int(self.module.config.vision_config.out_hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return cast("torch.dtype", self.module.dtype)

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        picture = self._open(media, item)
        values = self._processor(images=[picture], return_tensors="pt")
        pixels, (grid,) = values["pixel_values"], values["image_grid_thw"].tolist()
        if grid != list(item.grid):
            raise _grid_differs(item, grid)
        return Prepared(grid=tuple(grid), rows=item.rows, patches=pixels.shape[0], pixels=pixels)

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        pixels = torch.cat([each.pixels for each in batch]).to(self.device)
        grids = torch.tensor([each.grid for each in batch], dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            features = self.module.model.get_image_features(pixels, grids, return_dict=True).pooler_output
        return list(features)

    def _open(self, media: bytes | memoryview, item: MediaItem) -> Image.Image:
        """The pixels are decoded only once the header has the promised size, lying or standing."""
        try:
            with Image.open(io.BytesIO(media), formats=_FORMATS) as picture:
                self._check_header(picture, item)
                return ImageOps.exif_transpose(picture).convert("RGB")
        except _BROKEN as error:
            raise RequestError(400, f"picture {item.index} cannot be decoded: {error}", code="invalid_image") from error

    def _check_header(self, picture: Image.Image, item: MediaItem) -> None:
        found = self._family.picture_tokens(*picture.size, item.of)
        if sorted(found.grid) != sorted(item.grid) or found.rows != item.rows:
            raise _grid_differs(item, found.grid)


class LanguageModel:
    """Implements api.LanguageModel."""

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

    def layout(self, page_size: int) -> KvLayout:
        return KvLayout(
            page_size=page_size,
            layers=self._text.num_hidden_layers,
            kv_heads=self._text.num_key_value_heads,
            head_dim=self._text.hidden_size // self._text.num_attention_heads,
            dtype=str(self.module.dtype).removeprefix("torch."),
        )

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
            return cast("torch.Tensor", self.module.get_input_embeddings()(ids))

    def positions(self, tokens: Sequence[int], items: Sequence[PromptItem]) -> tuple[torch.Tensor, int]:
        kinds = torch.zeros(1, len(tokens), dtype=torch.int32)
        for item in items:
            kinds[0, item.offset : item.offset + item.rows] = 1
        grids = torch.tensor([item.grid for item in items], dtype=torch.int64)
        try:
            found, delta = self.module.model.get_rope_index(
                torch.tensor([tokens], dtype=torch.int64), mm_token_type_ids=kinds, image_grid_thw=grids
            )
        except (RuntimeError, StopIteration) as error:  # two items without a token between them, or a wrong length
            raise RequestError(400, f"the prompt's items do not fit its tokens: {error}") from error
        return found[:, 0], int(delta)

    def forward(self, step: StepInput) -> torch.Tensor:
        with torch.inference_mode():
            hidden = self.module.model.language_model(
                inputs_embeds=step.embeds.unsqueeze(0),
                position_ids=step.positions.unsqueeze(1),
                attention_mask={"full_attention": None},  # said, so that no mask is made that nobody reads
                use_cache=False,
                paged=step.paged,
            ).last_hidden_state
            return cast("torch.Tensor", self.module.lm_head(hidden[0, step.wanted]).float())


def load_tower(model: ModelConfig, device: torch.device) -> Tower:
    module = load_half(_TowerHalf, model, attention="sdpa", other=_LANGUAGE_KEYS)
    tower = Tower(model, module, device)
    module.model.visual.config._attn_implementation = tower_attention(model.attention, device, tower.dtype)
    return tower


def load_language(model: ModelConfig, device: torch.device) -> LanguageModel:
    register()
    module = load_half(_LanguageHalf, model, attention=PAGED, other=_TOWER_KEYS)
    if "sliding_attention" in module.config.get_text_config().layer_types:
        raise LoadError(f"{model.path} uses sliding-window attention, which the paged attention does not have")
    return LanguageModel(module, device)


def _image_processor(model: ModelConfig) -> Any:
    """The two kinds differ in pixels, so the plan says which. Raises LoadError."""
    with load_refusals(Path(model.path)):
        return _processor_class(model.image_processor).from_pretrained(model.path, local_files_only=True)


def _processor_class(kind: str) -> Any:
    match kind:
        case "pil":
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

            return Qwen2VLImageProcessorPil
        case "torchvision":
            from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

            return Qwen2VLImageProcessor
        case _:
            raise LoadError(f"no image processor {kind!r}", hint="image_processor: pil or torchvision")


def _grid_differs(item: MediaItem, found: Sequence[int]) -> RequestError:
    text = f"picture {item.index} is {[*found]} patches, the request was sized for {[*item.grid]}"
    return RequestError(400, text, code="invalid_image")
