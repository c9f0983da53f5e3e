"""A video as a list of pictures that somebody has chosen already: several files as one, each behind its length."""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = ["are_frames", "pack", "unpack"]

_MAGIC = b"epdctl frames\n"
_LENGTH = struct.Struct(">I")


def pack(files: Sequence[bytes]) -> bytes:
    """One medium, as it travels to the encoder."""
    return b"".join([_MAGIC, *(part for file in files for part in (_LENGTH.pack(len(file)), file))])


def are_frames(data: bytes | memoryview) -> bool:
    return bytes(data[: len(_MAGIC)]) == _MAGIC


def unpack(data: bytes | memoryview) -> list[bytes]:
    """Raises ValueError for what ``pack`` has not made."""
    files, at = [], len(_MAGIC)
    while at < len(data):
        if at + _LENGTH.size > len(data):
            raise ValueError("the list of frames ends within a length")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        if at > len(data):
            raise ValueError("the list of frames ends within a frame")
        files.append(bytes(data[at - length : at]))
    return files
