"""How long an MP3 is, exactly, without decoding it: its frames are counted by their headers.

A file without an Xing or Info frame at its head says nothing of its length, and libraries guess it from the first
bitrate: wrong for a varying one. Such a file is given the frame it lacks. The layout of headers and of that frame is
that of MPEG-1 and MPEG-2 layer III and of the LAME encoder's Info tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

__all__ = ["with_length"]

MPEG1, MPEG2, MPEG25 = 3, 2, 0
LAYER_III = 1
HEADER_BYTES = 4
RATES = {MPEG1: (44_100, 48_000, 32_000), MPEG2: (22_050, 24_000, 16_000), MPEG25: (11_025, 12_000, 8_000)}  # Hz
KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # a second; 0: not said in the header
KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
MONO = 3
TAGS = (b"Xing", b"Info", b"VBRI")
TRAILERS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3")  # what may follow the last frame
TAG_AT_MOST = 64  # bytes from a frame's start, where one of them begins
ROOM = 64  # bytes of a frame that is to hold one


@dataclass(frozen=True, slots=True)
class _Frame:
    version: int
    kbits: int
    rate: int
    padding: int
    channels: int

    @property
    def nbytes(self) -> int:
        return (144 if self.version == MPEG1 else 72) * 1000 * self.kbits // self.rate + self.padding

    @property
    def side_info(self) -> int:
        """Bytes between the header and the sound; the tag stands behind them."""
        if self.version == MPEG1:
            return 17 if self.channels == MONO else 32
        return 9 if self.channels == MONO else 17


def with_length(data: bytes) -> bytes:
    """The same sound with its number of frames at its head. Raises ValueError for one that ends within a frame."""
    start = _after_id3(data)
    first = _frame(data, start)
    if first is None or any(tag in data[start : start + TAG_AT_MOST] for tag in TAGS):
        return data  # it says so itself, or is none that can be counted: the library has the word
    count, end = _walk(data, start)
    if data[end:].strip(b"\0") and not data.startswith(TRAILERS, end):
        return data  # something between frames: who knows how many come after it
    return data[:start] + _info(data[start : start + 4], first, count) + data[start:]


def _after_id3(data: bytes) -> int:
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _walk(data: bytes, at: int) -> tuple[int, int]:
    """(frames, where they end). A body may hold millions: each costs a look at its header, and nothing is built."""
    count, last = 0, len(data) - HEADER_BYTES
    while at <= last and data[at] == 0xFF and (nbytes := _nbytes(data[at + 1], data[at + 2])):
        at += nbytes
        count += 1
        if at > len(data):
            raise ValueError("the sound clip ends within a frame: its end is missing")
    return count, at


@cache
def _nbytes(kind: int, rates: int) -> int:
    """Of a frame with these two bytes in its header, from it on; 0 where they are none of layer III."""
    frame = _frame(bytes([0xFF, kind, rates, 0]), 0)
    return 0 if frame is None else frame.nbytes


def _frame(data: bytes, at: int) -> _Frame | None:
    """None for what is not the header of a layer III frame whose size it says."""
    head = data[at : at + HEADER_BYTES]
    if len(head) < HEADER_BYTES or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bits, rate = head[2] >> 4, head[2] >> 2 & 3
    if version not in RATES or layer != LAYER_III or bits in (0, 15) or rate == 3:
        return None
    kbits = (KBITS_1 if version == MPEG1 else KBITS_2)[bits]
    return _Frame(version, kbits, RATES[version][rate], head[2] >> 1 & 1, head[3] >> 6)


def _info(head: bytes, first: _Frame, count: int) -> bytes:
    """A frame of silence that says how many frames come after it."""
    bits = head[2] >> 4
    while True:
        plain = bytes([0xFF, head[1] | 1, bits << 4 | head[2] & 0x0C, head[3]])  # no checksum, no padding
        frame = _frame(plain, 0)
        assert frame is not None, "a bitrate beyond the last one"
        if frame.nbytes >= ROOM:
            break
        bits += 1
    body = plain + bytes(first.side_info) + b"Info" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return body.ljust(frame.nbytes, b"\0")
