"""What a file says of itself: the size of a picture, the length of a clip. Decodes no pixel and no sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from epdctl.families import pictures, sounds, videos
from epdctl.families.base import Header, PictureHeader, SoundHeader, VideoHeader
from epdctl.families.frames import are_frames, unpack
from epdctl.ids import Modality
from epdctl.wire.config import Limits

__all__ = ["read_header"]

MOST_DECODED = 40_000_000_000  # pixels of all frames of a video: about ten minutes of 1080p


def read_header(modality: Modality, data: bytes, limits: Limits) -> Header:
    """Raises ValueError with the reason for what is no such file, or beyond the limits."""
    return _READERS[modality](data, limits)


def _picture(data: bytes, limits: Limits) -> PictureHeader:
    header = pictures.header_of(data)
    size = f"{header.width} x {header.height}"
    if header.width < 1 or header.height < 1:
        raise ValueError(f"the picture is {size} pixels")
    if header.width * header.height > limits.max_pixels:
        raise ValueError(f"the picture is {size} pixels; at most {limits.max_pixels} are served")
    return header


def _sound(data: bytes, limits: Limits) -> SoundHeader:
    header = sounds.header_of(data)
    seconds = header.frames / header.rate
    if seconds > limits.max_clip_seconds:
        raise ValueError(f"the sound clip is {seconds:.1f} s long; at most {limits.max_clip_seconds:g} s are served")
    return header


def _video(data: bytes, limits: Limits) -> VideoHeader:
    if are_frames(data):
        return _frames(unpack(data), limits)
    header = videos.header_of(data)
    pixels, seconds = header.width * header.height, header.frames / (header.rate or 1.0)
    if seconds > limits.max_clip_seconds:
        raise ValueError(f"the video is {seconds:.1f} s long; at most {limits.max_clip_seconds:g} s are served")
    if pixels > limits.max_pixels:
        size = f"{header.width} x {header.height}"
        raise ValueError(f"the video is {size} pixels large; at most {limits.max_pixels} are served")
    if pixels * header.frames > MOST_DECODED:
        raise ValueError(
            f"the video has {header.frames} frames of {pixels} pixels: too many to decode; make it smaller"
        )
    return header


def _frames(files: Sequence[bytes], limits: Limits) -> VideoHeader:
    """Each is looked at: all must be of one size."""
    sizes = {(found.width, found.height) for found in (_picture(file, limits) for file in files)}
    if len(sizes) != 1:
        raise ValueError(f"the video's frames are of {len(sizes)} sizes; they must be of one")
    ((width, height),) = sizes
    return VideoHeader(len(files), None, width, height)


_READERS: Mapping[Modality, Callable[[bytes, Limits], Header]] = {
    Modality.IMAGE: _picture,
    Modality.AUDIO: _sound,
    Modality.VIDEO: _video,
}
