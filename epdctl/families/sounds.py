"""Sound files: known by their content, opened, and their length from the header. Decodes no sample; free of torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from epdctl.families.base import SoundHeader
from epdctl.families.mp3 import with_length

if TYPE_CHECKING:
    from soundfile import SoundFile

__all__ = ["KINDS", "header_of", "opened"]

KINDS = ("WAV", "FLAC", "OGG", "MP3")  # by content: libsndfile knows more, and what it does not know it may guess
MOST_CHANNELS = 16
RATES = range(1_000, 384_001)  # Hz
UNTOLD = (1 << 63) - 1  # frames: libsndfile's word for a FLAC whose header leaves them out
STREAMED = 0x7FFF_0000  # sizes from here on are what programs write that do not know the length yet

_FORMATS = frozenset({"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"})  # libsndfile's names for them
_UNREADABLE = f"not a sound clip we can read ({', '.join(KINDS)}), or a damaged one"


def header_of(data: bytes) -> SoundHeader:
    """Raises ValueError like ``opened``."""
    with opened(data) as file:
        return SoundHeader(file.frames, file.samplerate)


@contextmanager
def opened(data: bytes) -> Iterator[SoundFile]:
    """Raises ValueError with the reason for what is not sound, has none, or ends before its time."""
    import soundfile  # 60 ms that most processes never need

    try:
        with soundfile.SoundFile(io.BytesIO(_checked(data))) as file:
            _check(file)
            yield file
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        # the library's words are not for clients: they tell of our objects and addresses
        raise ValueError(_UNREADABLE) from error


def _checked(data: bytes) -> bytes:
    """What the library may see, which takes half a file for a whole one."""
    magic = data[:4]
    if magic in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        _check_size(data)
    elif magic == b"OggS":
        _check_last_page(data)
    elif magic[:3] == b"ID3" or (magic[:1] == b"\xff" and int.from_bytes(magic[1:2]) & 0xE0 == 0xE0):
        return with_length(data)
    elif magic != b"fLaC":
        raise ValueError(_UNREADABLE)
    return data


def _check_size(data: bytes) -> None:
    size = 8 + int.from_bytes(data[4:8], "little")
    if len(data) < size < STREAMED:
        raise ValueError(f"the sound clip has {len(data)} of {size} bytes: its end is missing")


def _check_last_page(data: bytes) -> None:
    """A page's header says how long each of its segments is: 27 bytes, the last of them their number, then they."""
    at = data.rfind(b"OggS")
    segments = data[at + 27 : at + 27 + data[at + 26]] if at + 27 <= len(data) else b""
    if at + 27 + len(segments) + sum(segments) > len(data) or at + 27 > len(data):
        raise ValueError("the sound clip ends within a page: its end is missing")


def _check(file: SoundFile) -> None:
    if file.format not in _FORMATS:
        raise ValueError(_UNREADABLE)
    if file.frames == UNTOLD:
        raise ValueError("the sound clip's header does not say how long it is: it was written as a stream")
    if file.frames < 1:
        raise ValueError("the sound clip is empty: it has no samples")
    if file.samplerate not in RATES or not 1 <= file.channels <= MOST_CHANNELS:
        text = f"{file.channels} channels of {file.samplerate} Hz; at most {MOST_CHANNELS} of {RATES[0]} to {RATES[-1]}"
        raise ValueError(f"the sound clip has {text} Hz are served")
