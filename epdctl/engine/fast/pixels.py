"""Pictures as the 8-bit pixels that an image processor resizes to; a table stands for all that it does after that.

Pillow resizes here as in transformers' PIL processors, so the pixels are theirs, and so is, bit for bit, every number
that the table makes of them. A quarter of the bytes of float32 patches travel to the device, once and not twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from epdctl.engine.fast.layout import Grid

__all__ = ["EightBit"]


class EightBit:
    """``processor``: one of transformers' PIL image processors that cut a picture into patches of ``side`` pixels."""

    def __init__(self, processor: Any, side: int, *, pinned: bool) -> None:
        self.table = torch.from_numpy(_table(processor))
        self._resize = bool(processor.do_resize)
        self._filter = processor.resample
        self._side = side
        self._pinned = pinned

    def take(self, picture: Image.Image, grid: Grid) -> torch.Tensor:
        """[height, width, 3] of ``grid``'s size. Raises ValueError for another where the processor does not resize."""
        size = grid[2] * self._side, grid[1] * self._side
        if self._resize and picture.size != size:
            picture = picture.resize(size, self._filter)
        if picture.size != size:
            raise ValueError(f"a picture of {picture.size} for a grid of {size} pixels")
        pixels = torch.empty(size[1], size[0], 3, dtype=torch.uint8, pin_memory=self._pinned)
        pixels.numpy()[:] = np.asarray(picture)
        return pixels


def _table(processor: Any) -> np.ndarray[Any, Any]:
    """[3, 256] float32: what the processor's own arithmetic makes of each byte of each channel."""
    every: np.ndarray[Any, Any] = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
    if processor.do_rescale:
        every = processor.rescale(every, processor.rescale_factor)
    if processor.do_normalize:
        every = processor.normalize(every, processor.image_mean, processor.image_std)
    return every.reshape(3, 256).astype(np.float32)
