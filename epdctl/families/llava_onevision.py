"""LLaVA-OneVision without torch: how many tokens a picture becomes, alone (in tiles) or among others (as one)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdctl.errors import LoadError
from epdctl.families.base import Span
from epdctl.families.files import read_image_processor, read_json
from epdctl.families.media import PictureFamily, refuse_empty

__all__ = ["LlavaOnevision", "TileRule"]

# A picture among others is laid on a square of its longer side before it is scaled down: 8192 makes 200 MB of pixels.
LONGEST = 8192
SHRINK_BEYOND = 1.1  # times the patches that a picture may have, by side
_ASPECT = "anyres_max_"  # vision_aspect_ratio: this, and the number of tiles that a picture may be worth
_PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
_VISION = {"image_size": 384, "patch_size": 14}  # of a config that does not speak of its tower


@dataclass(frozen=True)
class TileRule:
    """How a lone picture is tiled, and how many patches of it are kept."""

    side: int  # of a tile, in pixels
    patches: int  # per side of a tile, one token each
    pinpoints: tuple[tuple[int, int], ...]  # (height, width): what a picture may be scaled to
    most: int  # a picture worth more tiles is scaled down after the tower

    @classmethod
    def read(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> TileRule:
        """From config.json and the image processor's config. Raises LoadError for a choice that is not served."""
        vision = config.get("vision_config") or _VISION
        side = vision.get("image_size", 224)
        pinpoints = processor.get("image_grid_pinpoints") or _PINPOINTS
        strategy = config.get("vision_feature_select_strategy", "full")
        aspect = str(config.get("vision_aspect_ratio", f"{_ASPECT}9"))
        if strategy != "full":
            raise LoadError(f"vision_feature_select_strategy {strategy!r} is not served", hint="served: full")
        if not aspect.startswith(_ASPECT) or not aspect.removeprefix(_ASPECT).isdecimal():
            raise LoadError(f"vision_aspect_ratio {aspect!r} is not served", hint=f"served: {_ASPECT}9 and the like")
        return cls(
            side=side,
            patches=side // vision.get("patch_size", 16),
            pinpoints=tuple((height, width) for height, width in pinpoints),
            most=int(aspect.removeprefix(_ASPECT)),
        )

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns): those of the pinpoint that keeps most of the picture and wastes least; the first of equals.

        The order of float operations, here and below, is transformers' own.
        """

        def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - pinpoint[0] * pinpoint[1]

        best = max(self.pinpoints, key=merit)
        return best[0] // self.side, best[1] // self.side

    def kept(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches that are left of the tiles without their padding, and not too many."""
        rows, columns = (self.patches * count for count in self.tiles(width, height))
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        ratio = math.sqrt(rows * columns / (self.most * self.patches**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > SHRINK_BEYOND else (rows, columns)


class LlavaOnevision(PictureFamily):
    """Implements families.base.Family. A grid is (tiles, height, width): how many squares the tower sees, the whole
    picture among them, and the size of the upright picture in pixels, by which what it sees is packed."""

    def __init__(self, directory: Path) -> None:
        self.rule = TileRule.read(read_json(directory / "config.json"), read_image_processor(directory))
        super().__init__(directory)

    def picture_tokens(self, width: int, height: int, of: int) -> Span:
        """A row per patch of the whole picture; then, of a lone one, the rows of its tiles, each line ended by a
        newline. One of several gets a single newline."""
        refuse_empty(width, height)
        if max(width, height) > LONGEST:
            raise ValueError(f"a picture of {width} x {height} pixels is longer than {LONGEST}")
        whole = self.rule.patches**2
        if of != 1:
            return Span(grid=(1, height, width), rows=whole + 1)
        down, across = self.rule.tiles(width, height)
        rows, columns = self.rule.kept(width, height)
        return Span(grid=(1 + down * across, height, width), rows=whole + rows * (columns + 1))
