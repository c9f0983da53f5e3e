"""A family's tower through the fast one, where the plan wants it, the device can and the modules are known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from epdctl.engine.api import Prepared
from epdctl.engine.fast import FastTower, Unsupported, fast_tower
from epdctl.engine.fast.pixels import EightBit
from epdctl.engine.wide import sums_are_wide
from epdctl.errors import LoadError
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem

__all__ = ["Optimized", "optimized"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Optimized:
    """``pictures``: None where the plan pinned an image processor whose pixels are not Pillow's."""

    tower: FastTower
    pictures: EightBit | None

    def prepare(self, picture: Image.Image, item: MediaItem) -> Prepared:
        assert self.pictures is not None
        time, height, width = item.grid
        pixels = self.pictures.take(picture, (time, height, width))
        return Prepared(grid=(time, height, width), rows=item.rows, patches=time * height * width, pixels=pixels)

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """[rows, width] per item; DeepStack sets beside the embedding. Pictures as 8-bit pixels make one forward, and
        what came as patches already, as videos do, another."""
        rows: dict[int, torch.Tensor] = {}
        for ready in (False, True):
            places = [n for n, each in enumerate(batch) if each.pixels.is_floating_point() is ready]
            if places:
                rows |= zip(places, self._forward([batch[n] for n in places]), strict=True)
        return [rows[n] for n in range(len(batch))]

    def _forward(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        found = self.tower.encode([each.pixels for each in batch], [each.grid for each in batch])
        rows = torch.cat([found.pooled, *found.deep], dim=1) if found.deep else found.pooled
        return [*torch.split(rows, [each.rows for each in batch])]


def optimized(model: ModelConfig, visual: Any, processor: Any) -> Optimized | None:
    """None where transformers' own forward stays; the log says why. Raises LoadError."""
    if model.optimize not in ("auto", "off"):
        raise LoadError(f"no optimization {model.optimize!r}", hint="optimize: auto or off")
    if model.optimize == "off" or model.attention == "sdpa":
        log.info("the tower runs as transformers has it: %s", "off" if model.optimize == "off" else "attention is sdpa")
        return None
    device = next(visual.parameters()).device
    pictures = None
    if model.image_processor == "pil":
        pictures = EightBit(processor, int(visual.patch_size), pinned=device.type == "cuda")
    try:
        tower = fast_tower(visual, None if pictures is None else pictures.table, wide=sums_are_wide(model))
    except Unsupported as error:
        log.info("the tower runs as transformers has it: %s", error)
        return None
    log.info("the tower runs through kernels of its own on %s", device)
    return Optimized(tower, pictures)
