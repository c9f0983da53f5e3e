"""How an MP4 says that its pictures are to be turned, as cameras that are held upright write it. FFmpeg tells it of
decoded frames alone, and a header must do. The boxes: ISO/IEC 14496-12, 8.3.2."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["quarter_turns"]

_ONE = 1 << 16  # of the matrix's numbers
_TURNS: Mapping[tuple[int, int, int, int], int] = {
    (0, -_ONE, _ONE, 0): 1,
    (-_ONE, 0, 0, -_ONE): 2,
    (0, _ONE, -_ONE, 0): 3,
}
_PLACES = {0: (12, 40), 1: (20, 52)}  # version of the track's header → where its id is, and its matrix


def quarter_turns(data: bytes, track: int) -> int:
    """Against the clock, until the pictures of ``track`` are upright; 0 where nothing is said, or other than that."""
    for header in _boxes(memoryview(data), (b"moov", b"trak", b"tkhd")):
        place, matrix = _PLACES.get(header[0] if header else -1, (0, len(header)))
        if len(header) >= matrix + 20 and int.from_bytes(header[place : place + 4]) == track:
            return _TURNS.get(struct.unpack_from(">ii4xii", header, matrix), 0)
    return 0


def _boxes(data: memoryview, path: Sequence[bytes]) -> Iterator[memoryview]:
    """What is in the boxes of this name within boxes of those names; a damaged box ends the search."""
    at = 0
    while at + 8 <= len(data):
        size, start = int.from_bytes(data[at : at + 4]), at + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8]), start + 8
        end = at + size if size else len(data)
        if end < start:
            return
        if data[at + 4 : at + 8] == path[0]:
            inside = data[start:end]
            yield from _boxes(inside, path[1:]) if len(path) > 1 else (inside,)
        at = end
