"""Videos for tests: seeded patchworks that change with every frame, as files of the kinds that are served."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from epdctl.families import open_family
from epdctl.families.frames import pack
from epdctl.ids import Modality
from epdctl.rank.headers import read_header
from epdctl.wire.config import Limits
from epdctl.wire.encode import MediaItem
from tests.support.reference import picture_bytes

__all__ = ["CODERS", "chosen_frames", "coded", "decoded", "promised", "sound_only", "video_bytes"]

# container → what FFmpeg calls it, and a coder of what it usually holds
CODERS = {
    "MP4": ("mp4", "libx264"),
    "MP4 of old": ("mp4", "mpeg4"),
    "QuickTime": ("mov", "libx264"),
    "WebM": ("webm", "libvpx-vp9"),
    "Matroska": ("matroska", "libx264"),
    "AVI": ("avi", "mpeg4"),
}


def coded(frames: NDArray[np.uint8], rate: int, kind: str = "mp4", coder: str = "libx264", **more: Any) -> bytes:
    """``frames``: [frames, height, width, 3]. ``more``: title; turn, in degrees against the clock; options."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=more.get("options", {})) as container:
        container.metadata["title"] = more.get("title", "")
        stream: Any = container.add_stream(coder, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(more.get("turn", 0))
        stream.codec_context.thread_count = 1
        pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
        for picture in (*pictures, None):
            container.mux(stream.encode(picture))
    return file.getvalue()


@cache
def video_bytes(
    seed: int, frames: int = 30, rate: int = 10, size: tuple[int, int] = (112, 84), what: str = "MP4"
) -> bytes:
    """``size``: (width, height), multiples of four."""
    draw, (width, height) = np.random.default_rng(seed), size
    tiles = draw.integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return coded(tiles.repeat(height // 4, axis=1).repeat(width // 4, axis=2), rate, *CODERS[what])


def sound_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16_000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16_000
        for each in (sound, None):
            container.mux(stream.encode(each))
    return file.getvalue()


def decoded(file: bytes) -> NDArray[np.uint8]:
    """[frames, height, width, 3]: all there are, as transformers' reader of the same library has them."""
    with av.open(io.BytesIO(file), "r") as container:
        return np.stack([np.asarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])


def chosen_frames(seed: int, count: int, size: tuple[int, int] = (112, 84)) -> tuple[list[bytes], bytes]:
    """JPEGs, and the one medium that they are."""
    files = [picture_bytes(1000 * seed + number, *size, "JPEG") for number in range(count)]
    return files, pack(files)


def promised(directory: Path, file: bytes) -> MediaItem:
    span = open_family(directory).span(read_header(Modality.VIDEO, file, Limits()), 1)
    return MediaItem(index=0, modality=Modality.VIDEO, content_hash="", of=1, grid=list(span.grid), rows=span.rows)
