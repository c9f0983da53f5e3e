"""From the bytes of a video to the frames that are shown of it, and to what transformers' processor makes of them.

A few steps of time go through the processor at once: no more decoded frames than that lie in memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray

from epdctl.engine.api import Prepared
from epdctl.engine.families.halves import load_refusals, torch_dtype
from epdctl.engine.families.pictures import check_grid, open_frame
from epdctl.errors import LoadError, RequestError
from epdctl.families.base import VideoHeader
from epdctl.families.frames import are_frames, unpack
from epdctl.families.qwen2_5_vl import PictureRule, Qwen25VL
from epdctl.families.videos import Video, opened
from epdctl.ids import Modality
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

__all__ = ["Videos"]

log = logging.getLogger(__name__)

STEPS = 4  # of time, that go through the processor at once
THERE = 0.9  # of the frames that a header promises; a file with fewer is damaged

Frame = NDArray[numpy.uint8]  # [height, width, 3], RGB


class Videos:
    """The part of a tower that prepares videos; safe on many threads at once."""

    def __init__(self, model: ModelConfig, family: Qwen25VL) -> None:
        self._family = family
        self._dtype = torch_dtype(model)
        self._processor, self._fault = _load(model, family)

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        """``pixels``: [patches, values of a patch], in the tower's own numbers. Raises RequestError (400)."""
        if self._processor is None:
            raise RequestError(400, self._fault, code="unsupported_modality")
        try:
            with self._opened(bytes(media)) as (header, frames):
                self._check(header, item)
                scale = self._family.video.scaled(self._family.video.shown(header))
                pixels = torch.cat([self._patches(some, scale) for some in self._together(frames)])
                if len(pixels) != math.prod(item.grid):
                    raise ValueError("its frames are of several sizes")
        except ValueError as error:
            raise RequestError(400, str(error), code="invalid_video") from error
        time, height, width = item.grid
        return Prepared(grid=(time, height, width), rows=item.rows, patches=len(pixels), pixels=pixels)

    @contextmanager
    def _opened(self, data: bytes) -> Iterator[tuple[VideoHeader, Iterator[Frame]]]:
        """What it says of itself, and the frames that are shown, decoded as they are asked for. Raises ValueError."""
        if are_frames(data):
            files = unpack(data)
            first = open_frame(files[0])
            yield VideoHeader(len(files), None, *first.size), (numpy.asarray(open_frame(file)) for file in files)
            return
        with opened(data) as video:
            yield video.header, _shown(video, self._indices(video.header))

    def _indices(self, header: VideoHeader) -> list[int]:
        """Which frames, in their order, as the processor has it. By its rounding it may add one that is not there."""
        from transformers.video_utils import VideoMetadata

        assert self._processor is not None
        count = self._family.video.shown(header)
        told = VideoMetadata(total_num_frames=header.frames, fps=header.rate)
        return [int(each) for each in self._processor.sample_frames(told, num_frames=count)][:count]

    def _check(self, header: VideoHeader, item: MediaItem) -> None:
        """Before any frame is decoded, but for the first of chosen ones."""
        found = self._family.span(header, item.of)
        check_grid(item, found.grid)
        if found.rows != item.rows:
            raise ValueError(f"it makes {found.rows} rows, the request was sized for {item.rows}")

    def _together(self, frames: Iterator[Frame]) -> Iterator[list[Frame]]:
        while some := list(islice(frames, STEPS * self._family.video.together)):
            if len({frame.shape for frame in some}) > 1:
                raise ValueError("its frames are of several sizes")
            yield some

    def _patches(self, frames: Sequence[Frame], scale: PictureRule) -> torch.Tensor:
        """``scale`` is said, and with it what the processor would make of how many frames there are."""
        assert self._processor is not None
        values = self._processor(
            videos=[torch.from_numpy(numpy.stack(frames)).permute(0, 3, 1, 2)],
            do_sample_frames=False,
            size={"shortest_edge": scale.min_pixels, "longest_edge": scale.max_pixels},
            return_tensors="pt",
            **({"cap_pixels_per_frame": False} if hasattr(self._processor, "cap_pixels_per_frame") else {}),
        )
        patches: torch.Tensor = values["pixel_values_videos"]
        return patches.to(self._dtype)


def _load(model: ModelConfig, family: Qwen25VL) -> tuple[Any, str]:
    """The processor, or why there is none: pictures are served without it."""
    if (obstacle := family.obstacle(Modality.VIDEO)) is not None:
        return None, obstacle
    try:
        with load_refusals(Path(model.path)):
            from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

            return Qwen2VLVideoProcessor.from_pretrained(model.path, local_files_only=True), ""
    except LoadError as error:
        log.warning("videos are not served: %s", error.message)
        return None, f"videos are not served here: {error.message}"


def _shown(video: Video, indices: Sequence[int]) -> Iterator[Frame]:
    """In the order of ``indices``, which ascend. The last frame of a file stands for those that are not there: how many
    it has is an estimate in some kinds. Raises ValueError for one that breaks off."""
    header, waiting, found, last = video.header, list(reversed(indices)), 0, None
    size = (header.height, header.width) if video.turns % 2 else (header.width, header.height)
    for last in video.container.decode(video.stream):
        if (last.width, last.height) != size:
            raise ValueError("its frames are of another size than its header says")
        while waiting and waiting[-1] == found:
            waiting.pop()
            yield _upright(last, video.turns)
        if not waiting:
            return
        found += 1
    if last is None or found < THERE * header.frames:
        raise ValueError(f"it ends after {found} of {header.frames} frames: it is damaged")
    for _ in waiting:
        yield _upright(last, video.turns)


def _upright(frame: VideoFrame, turns: int) -> Frame:
    """As transformers' own reader of this library has it, and turned as the file says."""
    return numpy.rot90(numpy.asarray(frame.to_ndarray(format="rgb24"), dtype=numpy.uint8), turns)
