"""Picture files that say more of themselves than their size."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

from PIL import Image

__all__ = ["ASCII", "ORIENTATION", "RATIONAL", "behind_the_pixels", "exif", "png_chunk", "saved", "short"]

ORIENTATION = 0x0112
ASCII, SHORT, RATIONAL = 2, 3, 5  # kinds of an entry's value

Entry = tuple[int, int, int, bytes]  # tag, kind, count, value


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def short(tag: int, value: int) -> Entry:
    return tag, SHORT, 1, struct.pack(">HH", value, 0)


def exif(entries: Sequence[Entry]) -> bytes:
    """Written by hand: with whatever kinds of values, as cameras and programs leave them."""
    head = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    room, table, values = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            place, values = struct.pack(">I", room + len(values)), values + value
        else:
            place = value.ljust(4, b"\0")
        table += struct.pack(">HHI", tag, kind, count) + place
    return b"Exif\0\0" + head + table + bytes(4) + values


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + zlib.crc32(kind + data).to_bytes(4)


def behind_the_pixels(png: bytes, *chunks: bytes) -> bytes:
    end = png.rindex(b"IEND") - 4
    return png[:end] + b"".join(chunks) + png[end:]
