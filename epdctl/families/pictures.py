"""Picture files by what they say of themselves: which kinds are served, how large one is, which way up it is shown.
Decodes no pixel."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from PIL import ExifTags, Image

from epdctl.families.base import PictureHeader

__all__ = ["FORMATS", "header_of", "opened", "pillow", "turn_of"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # by content. Pillow knows more, and some of them start other programs

_TURNS: Mapping[object, Image.Transpose] = {  # by EXIF's orientation; whatever else stands there is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))  # these swap width and height

_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")  # length and type, before the data; four bytes of checksum come behind it
_CHUNK_TYPE = re.compile(rb"\w{4}")
_TELLING = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})  # where an orientation may stand
MOST_CHUNKS = 100_000  # of a PNG; usual ones hold 8 KiB each


@contextmanager
def pillow() -> Iterator[None]:
    """Around calls of Pillow and nothing else. What it raises over bytes is no closed list, and its words are not for
    clients: they tell of our objects and addresses. Raises ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError("the picture has too many pixels") from error
    except Exception as error:
        raise ValueError(f"not a picture we can read ({', '.join(FORMATS)}), or a damaged one") from error


def opened(data: bytes | memoryview) -> Image.Image:
    """To be closed by the caller. Raises ValueError."""
    with pillow():
        return Image.open(io.BytesIO(data), formats=FORMATS)


def header_of(data: bytes) -> PictureHeader:
    """Raises ValueError with the reason for what is no picture."""
    with opened(data) as picture:
        width, height = picture.size
        turn = _turn_by_header(picture, data)
    return PictureHeader(height, width) if turn in _LYING else PictureHeader(width, height)


def turn_of(exif: Image.Exif) -> Image.Transpose | None:
    """As Pillow's exif_transpose finds it. That writes the whole EXIF anew too, and fails over what it cannot write."""
    return _TURNS.get(exif.get(ExifTags.Base.Orientation))


def _turn_by_header(picture: Image.Image, data: bytes) -> Image.Transpose | None:
    """The base's getexif: a PNG's own would decode the pixels, to see what comes behind them."""
    late = _behind_the_pixels(data, bool(getattr(picture, "is_animated", False))) if picture.format == "PNG" else None
    with pillow():
        if late is None:
            return turn_of(Image.Image.getexif(picture))
        with Image.open(io.BytesIO(late), formats=("PNG",)) as told:
            return turn_of(Image.Image.getexif(told))


def _behind_the_pixels(data: bytes, animated: bool) -> bytes | None:
    """A PNG without pixels that says what ``data`` says, before its pixels and behind them; None where nothing comes
    behind. Pillow does not look at the checksums there."""
    pixels, late = None, []
    for kind, at, end in _chunks(data):
        if kind == b"IDAT" and pixels is None:
            pixels = at
        elif pixels is None:
            continue
        elif kind == b"IEND" or (animated and kind == b"fcTL"):  # the second picture begins
            break
        elif kind in _TELLING:
            checksum = zlib.crc32(data[at + 4 : end])
            late.append(data[at:end] + checksum.to_bytes(4))
    return data[:pixels] + b"".join(late) + _CHUNK.pack(0, b"IDAT") if late else None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, first byte, and end of the data, of each that is whole. Raises ValueError for too many."""
    at = len(_PNG)
    for _ in range(MOST_CHUNKS):
        if at + _CHUNK.size > len(data):
            return
        length, kind = _CHUNK.unpack_from(data, at)
        end = at + _CHUNK.size + length
        if end > len(data) or not _CHUNK_TYPE.fullmatch(kind):
            return
        yield kind, at, end
        at = end + 4
    raise ValueError(f"the picture is a PNG of more than {MOST_CHUNKS} chunks")
