"""From the bytes of a sound clip to samples at the model's rate, of the promised length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy
import soxr
from numpy.typing import NDArray

from epdctl.engine.families.pictures import check_grid
from epdctl.errors import RequestError
from epdctl.families.base import SoundHeader
from epdctl.families.qwen2_audio import Qwen2Audio, SoundRule
from epdctl.families.sounds import opened
from epdctl.wire.encode import MediaItem

if TYPE_CHECKING:
    from soundfile import SoundFile

__all__ = ["Samples", "hear"]

BLOCK = 65_536  # samples of each channel, read at once
MP3_SLACK = 2 * 1152  # samples: two frames
MARGIN = 1.0  # seconds that resampling looks beyond what is heard: ten times what its longest filter does

Samples = NDArray[numpy.float32]


def hear(media: bytes | memoryview, item: MediaItem, family: Qwen2Audio) -> Samples:
    """[samples], one channel, at the model's rate; of a long clip the part that the model hears, and a second more.

    As transformers does it by way of librosa: channels averaged, then soxr at its high quality, then silence up to the
    length that the header promises. Nothing is decoded unless that is the promised one. Raises RequestError (400).
    """
    rule = family.rule
    try:
        with opened(bytes(media)) as file:
            rate = file.samplerate
            _check_header(SoundHeader(file.frames, rate), item, family)
            mono = _read(file, min(file.frames, math.ceil((rule.seconds + MARGIN) * rate)))
    except ValueError as error:
        raise RequestError(400, str(error), code="invalid_audio") from error
    return _resampled(mono, rate, rule)


def _check_header(header: SoundHeader, item: MediaItem, family: Qwen2Audio) -> None:
    found = family.span(header, item.of)
    check_grid(item, found.grid)
    if found.rows != item.rows:
        raise ValueError(f"it makes {found.rows} rows, the request was sized for {item.rows}")


def _read(file: SoundFile, wanted: int) -> Samples:
    """Block by block, so that many channels never lie in memory at once."""
    mono = numpy.empty(wanted, dtype=numpy.float32)
    done = 0
    while done < wanted:
        block = _block(file, min(BLOCK, wanted - done))
        if not len(block):
            _check_shortfall(file, done)
            mono[done:] = 0
            break
        block.mean(axis=1, out=mono[done : done + len(block)])
        done += len(block)
    if not numpy.isfinite(mono).all():
        raise ValueError("it holds samples that are no numbers")
    return mono


def _check_shortfall(file: SoundFile, done: int) -> None:
    """Encoders of MP3 count their frames one off, the frame that says how many there are being one itself."""
    if file.format != "MP3" or file.frames - done > MP3_SLACK:
        raise ValueError(f"it ends after {done} of {file.frames} samples: it is damaged")


def _block(file: SoundFile, count: int) -> Samples:
    """[samples, channels]."""
    import soundfile

    try:
        found: Samples = file.read(count, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError("it is damaged") from error
    return found


def _resampled(mono: Samples, rate: int, rule: SoundRule) -> Samples:
    if rate == rule.rate:
        return mono
    due = rule.samples(SoundHeader(len(mono), rate))
    found: Samples = soxr.resample(mono, rate, rule.rate, "soxr_hq")[:due]
    return numpy.pad(found, (0, due - len(found)))
