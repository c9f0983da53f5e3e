"""The torch half of LLaVA-OneVision. A lone picture is seen whole and in tiles, one of several only whole; the tower's
output is packed line by line, and what ends a line, ``image_newline``, lives with the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers.models.llava_onevision import modeling_llava_onevision as library

from epdctl.engine.api import Prepared
from epdctl.engine.families.halves import as_the_librarys_own, load_half
from epdctl.engine.families.language import PlainLanguage, load_paged
from epdctl.engine.families.pictures import check_grid, load_processor, open_picture
from epdctl.errors import LoadError
from epdctl.families.llava_onevision import LlavaOnevision
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem

__all__ = ["load_language", "load_tower"]

_TOWER_KEYS = tuple(
    f"{prefix}{name}"
    for prefix in ("", "model.")
    for name in ("vision_tower.", "multi_modal_projector.", "image_newline")
)
_LANGUAGE_KEYS = ("lm_head.", "language_model.", "model.language_model.")


@as_the_librarys_own
class _TowerHalf(library.LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """Without the language model."""

    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012 - the library's own kind of declaration

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.language_model = None
        self.lm_head = None


@as_the_librarys_own
class _LanguageHalf(library.LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """Without the tower, and without what stands between them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.vision_tower = None
        self.model.multi_modal_projector = None


class _Tower:
    """Implements api.Tower. ``Prepared.pixels``: [tiles, 3, side, side], the whole picture first."""

    def __init__(self, model: ModelConfig, module: Any, device: torch.device) -> None:
        self.module = module.to(device)
        self.device = device
        self._family = LlavaOnevision(Path(model.path))
        self._processor = load_processor(model, {"pil": _pil_processor, "torchvision": _torchvision_processor})

    @property
    def width(self) -> int:
        return int(self.module.config.get_text_config().hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return cast("torch.dtype", self.module.dtype)

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        picture = open_picture(media, item, self._family)
        values = self._processor.one_of([picture], item.of)
        (pixels,), ((height, width),) = values["pixel_values"], values["image_sizes"].tolist()
        check_grid(item, (len(pixels), height, width))
        patches = len(pixels) * self._family.rule.patches**2
        return Prepared(grid=(len(pixels), height, width), rows=item.rows, patches=patches, pixels=pixels)

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """Tiled pictures first: transformers is told of groups, and only a group of one is tiled."""
        order = sorted(range(len(batch)), key=lambda index: batch[index].grid[0] == 1)
        tiled = sum(each.grid[0] > 1 for each in batch)
        groups = [1] * tiled + [len(batch) - tiled + 1]  # one more than there are: the last may be alone, and untiled
        with torch.inference_mode():
            found = self.module.model.get_image_features(
                torch.cat([batch[index].pixels for index in order]).to(self.device, self.dtype),
                torch.tensor([batch[index].grid[1:] for index in order]),
                batch_num_images=groups,
                return_dict=True,
            ).pooler_output
        return [rows for _, rows in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def load_tower(model: ModelConfig, device: torch.device) -> _Tower:
    if model.attention == "varlen":
        raise LoadError(
            f"the tower of {model.path} sees squares of one size and has no use for varlen attention",
            hint="attention: auto or sdpa",
        )
    if model.attention not in ("auto", "sdpa"):
        raise LoadError(f"no attention {model.attention!r}", hint="attention: auto or sdpa")
    return _Tower(model, load_half(_TowerHalf, model, attention="sdpa", other=_LANGUAGE_KEYS), device)


def load_language(model: ModelConfig, device: torch.device) -> PlainLanguage:
    module = load_paged(_LanguageHalf, model, other=_TOWER_KEYS)
    module.model.image_newline = None  # the tower's; not taken out before, for the library's loading asks for it
    return PlainLanguage(module, device)


def _pil_processor() -> Any:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return _taking_one_of(LlavaOnevisionImageProcessorPil)


def _torchvision_processor() -> Any:
    from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor

    return _taking_one_of(LlavaOnevisionImageProcessor)


def _taking_one_of(library_class: type[Any]) -> type[Any]:
    """Its own ``preprocess`` counts the pictures that it is given; ours come one by one, and say how many they are."""

    class OneOf(library_class):  # type: ignore[misc]
        def one_of(self, pictures: Sequence[Any], of: int) -> Any:
            return super(library_class, self).preprocess(pictures, [of], return_tensors="pt")

    return OneOf
