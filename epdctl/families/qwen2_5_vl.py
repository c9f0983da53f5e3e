"""Qwen2.5-VL without torch: how many tokens a picture becomes, and where they go in the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdctl.errors import LoadError
from epdctl.families.base import Picture, Prompt
from epdctl.families.files import read_json, read_json_if_there
from epdctl.wire.serve import PromptItem

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
        """From preprocessor_config.json: the old ``min_pixels`` wins over the new ``size.shortest_edge``, as there."""
        size = config.get("size") or {}
        return cls(
            patch=config.get("patch_size", cls.patch),
            merge=config.get("merge_size", cls.merge),
            min_pixels=config.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels,
            max_pixels=config.get("max_pixels") or size.get("longest_edge") or cls.max_pixels,
        )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches. Raises ValueError for a shape that no scaling makes sense of."""
        if width < 1 or height < 1:
            raise ValueError(f"a picture of {width} x {height} pixels is empty")
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


class Qwen25VL:
    """Implements families.base.Family."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / "config.json")
        self.rule = PictureRule.read(read_json(directory / "preprocessor_config.json"))
        self.image_token = _integer(config, "image_token_id", directory)
        self._end = _end_tokens(read_json_if_there(directory / "generation_config.json"), config)
        if not self._end:
            raise LoadError(f"{directory} names no eos_token_id, neither in generation_config.json nor in config.json")

    @property
    def end_token_ids(self) -> Sequence[int]:
        return self._end

    def picture_tokens(self, width: int, height: int, of: int) -> Picture:
        """``of`` changes nothing here: a lone picture is treated like one of many."""
        rows, columns = self.rule.grid(width, height)
        return Picture(grid=(1, rows, columns), rows=rows * columns // self.rule.merge**2)

    def expand(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> Prompt:
        found = sum(token == self.image_token for token in tokens)
        if found != len(pictures):
            raise ValueError(f"the prompt has {found} places for pictures, and there are {len(pictures)} pictures")
        prompt = Prompt([], [])
        for token in tokens:
            if token == self.image_token:
                self._place(prompt, pictures[len(prompt.items)])
            else:
                prompt.tokens.append(token)
        return prompt

    def _place(self, prompt: Prompt, picture: Picture) -> None:
        item = PromptItem(
            index=len(prompt.items),
            modality="image",
            grid=list(picture.grid),
            offset=len(prompt.tokens),
            rows=picture.rows,
        )
        prompt.items.append(item)
        prompt.tokens.extend([self.image_token] * picture.rows)


def _integer(config: dict[str, Any], key: str, directory: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise LoadError(f"{directory}/config.json: {key} is {value!r}, not a token id")
    return value


def _end_tokens(generation: dict[str, Any], config: dict[str, Any]) -> list[int]:
    """The first of the places where a checkpoint may name them that does."""
    for source in (generation, config, config.get("text_config") or {}):
        named = source.get("eos_token_id")
        if named is not None:
            return list(named) if isinstance(named, list) else [named]
    return []
