"""Pictures of a request: data: URLs to bytes, their size from the header, their hash. Decodes no pixel."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import struct
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from epdctl.errors import RequestError
from epdctl.wire.config import Limits

__all__ = ["FORMATS", "Medium", "measure", "read_picture"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # by content; the media type in the URL is not believed
ORIENTATION = 0x0112
TURNED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap width and height

_DATA_URL = re.compile(r"data:(?P<type>image/[\w.+-]+)(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)

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


@dataclass(frozen=True, slots=True)
class Medium:
    """One picture, exactly as the client sent it. ``width`` and ``height`` are those of the upright picture."""

    data: bytes
    content_hash: str  # blake2b-128, hex
    width: int
    height: int


def read_picture(url: str, param: str, limits: Limits) -> Medium:
    """Raises RequestError (400), with ``param`` naming the place in the request."""
    return measure(_bytes(url, param), param, limits)


def measure(data: bytes, param: str, limits: Limits) -> Medium:
    """A picture's file as it came. Raises RequestError (400) like ``read_picture``."""
    width, height = _size(data, param)
    if width * height > limits.max_pixels:
        raise _too_many_pixels(param, limits, f"{width} x {height}")
    return Medium(data, hashlib.blake2b(data, digest_size=16).hexdigest(), width, height)


def _bytes(url: str, param: str) -> bytes:
    header = _DATA_URL.match(url)
    if header is None:
        raise _bad(param, "not a data: URL of a picture; expected data:image/png;base64,…")
    try:
        data = base64.b64decode(memoryview(url.encode("ascii"))[header.end() :], validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _bad(param, f"not base64: {error}") from error
    if not data:
        raise _bad(param, "the picture is empty")
    return data


def _size(data: bytes, param: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            turned = _orientation(picture) in TURNED
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bad(param, f"the picture has too many pixels: {error}") from error
    except _UNREADABLE as error:
        # Pillow's words are not for clients: they tell of our objects and addresses
        raise _bad(param, f"not a picture we can read ({', '.join(FORMATS)}), or a damaged one") from error
    if width < 1 or height < 1:
        raise _bad(param, f"the picture is {width} x {height} pixels")
    return (height, width) if turned else (width, height)


def _orientation(picture: Image.Image) -> int:
    """As Pillow's exif_transpose finds it. The base's method: a PNG's own would decode the pixels to look further."""
    value = Image.Image.getexif(picture).get(ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def _bad(param: str, text: str) -> RequestError:
    return RequestError(400, f"{param}: {text}", param=param, code="invalid_image")


def _too_many_pixels(param: str, limits: Limits, size: str) -> RequestError:
    return _bad(param, f"the picture is {size} pixels; at most {limits.max_pixels} are served")
