"""What a file says of itself: the size of a picture, the length of a clip. Decodes no pixel and no sample."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence

from PIL import Image, UnidentifiedImageError

from epdctl.families import sounds, videos
from epdctl.families.base import Header, PictureHeader, SoundHeader, VideoHeader
from epdctl.families.frames import are_frames, unpack
from epdctl.ids import Modality
from epdctl.wire.config import Limits

__all__ = ["PICTURES", "read_header"]

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # by content; the media type in the URL is not believed
ORIENTATION = 0x0112
MOST_DECODED = 40_000_000_000  # pixels of all frames of a video: about ten minutes of 1080p
TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height

_UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,  # Pillow's own word for a broken PNG
    struct.error,
    IndexError,
    KeyError,
    EOFError,
)


def read_header(modality: Modality, data: bytes, limits: Limits) -> Header:
    """Raises ValueError with the reason for what is no such file, or beyond the limits."""
    return _READERS[modality](data, limits)


def _picture(data: bytes, limits: Limits) -> PictureHeader:
    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
            width, height = picture.size
            turned = _orientation(picture) in TURNED
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"the picture has too many pixels: {error}") from error
    except _UNREADABLE as error:
        # Pillow's words are not for clients: they tell of our objects and addresses
        raise ValueError(f"not a picture we can read ({', '.join(PICTURES)}), or a damaged one") from error
    if width < 1 or height < 1:
        raise ValueError(f"the picture is {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ValueError(f"the picture is {width} x {height} pixels; at most {limits.max_pixels} are served")
    return PictureHeader(height, width) if turned else PictureHeader(width, height)


def _orientation(picture: Image.Image) -> int:
    """As Pillow's exif_transpose finds it. The base's method: a PNG's own would decode the pixels to look further."""
    value = Image.Image.getexif(picture).get(ORIENTATION, 1)
    return value if isinstance(value, int) else 1


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
