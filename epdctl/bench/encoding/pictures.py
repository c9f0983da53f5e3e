"""Pictures to measure with."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

__all__ = ["commented", "picture"]


def picture(seed: int, side: int) -> bytes:
    """A JPEG of noise: the most work that a decoder can get from a picture of this size."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    return file.getvalue()


def commented(jpeg: bytes, text: bytes) -> bytes:
    """The same picture in other bytes."""
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]
