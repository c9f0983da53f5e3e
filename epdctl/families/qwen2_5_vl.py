"""Qwen2.5-VL without torch: how many tokens a picture becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdctl.families.base import Span
from epdctl.families.files import read_image_processor
from epdctl.families.media import PictureFamily, refuse_empty

__all__ = ["PictureRule", "Qwen25VL"]

MAX_ASPECT = 200  # beyond it the processor refuses


@dataclass(frozen=True)
class PictureRule:
    """How the image processor chooses the size it scales a picture to. The defaults are the processor's own."""

    patch: int = 14  # pixels
    merge: int = 2  # patches, per side, that become one token
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    @classmethod
    def read(cls, config: dict[str, Any]) -> PictureRule:
        """Of the image processor: the old ``min_pixels`` wins over the new ``size.shortest_edge``, as there."""
        size = config.get("size") or {}
        return cls(
            patch=config.get("patch_size", cls.patch),
            merge=config.get("merge_size", cls.merge),
            min_pixels=config.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels,
            max_pixels=config.get("max_pixels") or size.get("longest_edge") or cls.max_pixels,
        )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches. Raises ValueError for a shape that no scaling makes sense of."""
        refuse_empty(width, height)
        if max(width, height) / min(width, height) > MAX_ASPECT:
            raise ValueError(f"a picture of {width} x {height} pixels is longer than {MAX_ASPECT} times its breadth")
        scaled_height, scaled_width = self._scaled(height, width)
        return scaled_height // self.patch, scaled_width // self.patch

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Both sides multiples of one token's side, the area within bounds, the shape as near as that allows.

        The order of float operations is the processor's: a picture on a boundary must fall on the same side.
        """
        unit = self.patch * self.merge
        nearest = round(height / unit) * unit, round(width / unit) * unit
        if nearest[0] * nearest[1] > self.max_pixels:
            shrink = math.sqrt((height * width) / self.max_pixels)
            return (
                max(unit, math.floor(height / shrink / unit) * unit),
                max(unit, math.floor(width / shrink / unit) * unit),
            )
        if nearest[0] * nearest[1] < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
        return nearest


class Qwen25VL(PictureFamily):
    """Implements families.base.Family. A grid is (t, h, w) in patches, before merging."""

    def __init__(self, directory: Path) -> None:
        self.rule = PictureRule.read(read_image_processor(directory))
        super().__init__(directory)

    def picture_tokens(self, width: int, height: int, of: int) -> Span:
        """``of`` changes nothing here: a lone picture is treated like one of many."""
        rows, columns = self.rule.grid(width, height)
        return Span(grid=(1, rows, columns), rows=rows * columns // self.rule.merge**2)
