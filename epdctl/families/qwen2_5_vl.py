"""Qwen2.5-VL without torch: how many tokens a picture or a video becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epdctl.families import videos
from epdctl.families.base import Header, Span, VideoHeader
from epdctl.families.files import read_image_processor, read_video_processor
from epdctl.families.media import PictureFamily, refuse_empty
from epdctl.ids import Modality

__all__ = ["PictureRule", "Qwen25VL", "VideoRule"]

MAX_ASPECT = 200  # beyond it the processor refuses


@dataclass(frozen=True)
class PictureRule:
    """How the image processor chooses the size it scales a picture to. The defaults are the processor's own."""

    patch: int = 14  # pixels
    merge: int = 2  # patches, per side, that become one token
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    @classmethod
    def read(cls, config: dict[str, Any], default: PictureRule | None = None) -> PictureRule:
        """Of a processor: the old ``min_pixels`` wins over the new ``size.shortest_edge``, as there."""
        size, default = config.get("size") or {}, default or cls()
        return cls(
            patch=config.get("patch_size", default.patch),
            merge=config.get("merge_size", default.merge),
            min_pixels=config.get("min_pixels") or size.get("shortest_edge") or default.min_pixels,
            max_pixels=config.get("max_pixels") or size.get("longest_edge") or default.max_pixels,
        )

    @property
    def unit(self) -> int:
        """Pixels per side of one token."""
        return self.patch * self.merge

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
        unit = self.unit
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


@dataclass(frozen=True)
class VideoRule:
    """Which frames of a video are shown, and how large. The defaults are the video processor's own, and of the rate,
    which that leaves open, the model's."""

    frame: PictureRule = PictureRule(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)
    together: int = 2  # frames that make one step of time
    rate: float = 2.0  # frames shown of each second
    least: int = 4  # frames shown, where there are as many
    most: int = 768
    capped: bool = (
        False  # many frames share a budget of tokens: the reference's way, and transformers' where it is said
    )
    budget: int = 128_000

    @classmethod
    def read(cls, config: dict[str, Any]) -> VideoRule:
        """Of the video processor."""
        return cls(
            frame=PictureRule.read(config, cls.frame),
            together=config.get("temporal_patch_size") or cls.together,
            rate=config.get("fps") or cls.rate,
            least=config.get("min_frames") or cls.least,
            most=config.get("max_frames") or cls.most,
            capped=bool(config.get("cap_pixels_per_frame")),
            budget=config.get("max_video_tokens") or cls.budget,
        )

    def shown(self, header: VideoHeader) -> int:
        """How many frames. Raises ValueError for a video of fewer than make one step, or with too many chosen ones."""
        if header.rate is None:
            if not 1 <= header.frames <= self.most:
                raise ValueError(f"a list of {header.frames} frames; 1 to {self.most} are served")
            return header.frames
        wanted = max(header.frames / header.rate * self.rate, self.least)
        found = self._steps(min(wanted, self._steps(min(self.most, header.frames)), header.frames))
        if found < 1:
            raise ValueError(f"a video of {header.frames} frames is too short: the model needs {self.together}")
        return found

    def _steps(self, frames: float) -> int:
        """Whole ones, in frames."""
        return math.floor(frames / self.together) * self.together

    def scaled(self, frames: int) -> PictureRule:
        """What each of so many frames is scaled by."""
        if not self.capped:
            return self.frame
        pixels = int(self.budget * self.frame.unit * self.frame.unit * 0.9)
        share = min(self.frame.max_pixels, pixels * self.together // frames)
        return replace(self.frame, max_pixels=max(share, int(self.frame.min_pixels * 1.05)))

    def grid(self, header: VideoHeader) -> tuple[int, int, int]:
        """(steps of time, rows, columns) of patches. Raises ValueError."""
        frames = self.shown(header)
        rows, columns = self.scaled(frames).grid(header.width, header.height)
        return -(-frames // self.together), rows, columns

    def seconds(self, header: VideoHeader) -> float:
        """Of one step. Frames that somebody else has chosen count as chosen at the model's own rate."""
        rate = self.rate if header.rate is None else self.shown(header) / header.frames * header.rate
        return self.together / rate


class Qwen25VL(PictureFamily):
    """Implements families.base.Family. A grid is (t, h, w) in patches, before merging."""

    placeholders = {  # noqa: RUF012  (a class variable above)
        **PictureFamily.placeholders,
        Modality.VIDEO: ("video_token_id", "video_token_index"),
    }

    def __init__(self, directory: Path) -> None:
        self.rule = PictureRule.read(read_image_processor(directory))
        self.video = VideoRule.read(read_video_processor(directory))
        self._missing: Sequence[str] = videos.missing()
        super().__init__(directory)

    def obstacle(self, modality: Modality) -> str | None:
        if modality is not Modality.VIDEO or not self._missing:
            return None
        names = " and ".join(self._missing)
        return f"videos need {names}, which {_are(self._missing)} not installed here: {videos.EXTRA}"

    def span(self, header: Header, of: int) -> Span:
        if not isinstance(header, VideoHeader) or Modality.VIDEO not in self.modalities:
            return super().span(header, of)
        grid = self.video.grid(header)
        rows = math.prod(grid) // self.video.frame.merge**2
        return Span(grid, rows, Modality.VIDEO, self.video.seconds(header))

    def picture_tokens(self, width: int, height: int, of: int) -> Span:
        """``of`` changes nothing here: a lone picture is treated like one of many."""
        rows, columns = self.rule.grid(width, height)
        return Span(grid=(1, rows, columns), rows=rows * columns // self.rule.merge**2)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
