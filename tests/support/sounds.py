"""Sound for tests: seeded clips, as files of every kind that is served."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

__all__ = ["RATE", "as_file", "heard", "noise", "sound_bytes"]

RATE = 16_000  # Hz

Samples = NDArray[np.float32]


def noise(seed: int, seconds: float, rate: int = RATE, channels: int = 1) -> Samples:
    """[samples] or [samples, channels]: a few tones that come and go, in some noise."""
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * draw.uniform(100, 3000) * time + draw.uniform(0, 6)) for _ in range(4)]
    swell = [np.sin(2 * np.pi * draw.uniform(0.3, 3) * time + draw.uniform(0, 6)) for _ in range(4)]
    mono = 0.1 * sum(tone * loud for tone, loud in zip(tones, swell, strict=True))
    every = [mono + 0.01 * draw.standard_normal(len(time)) for _ in range(channels)]
    return np.stack(every, axis=-1).astype(np.float32)[:, 0 if channels == 1 else slice(None)]


def as_file(samples: Samples, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@cache
def sound_bytes(seed: int, seconds: float) -> bytes:
    """A WAV file at the model's own rate."""
    return as_file(noise(seed, seconds))


def heard(file: bytes, rate: int = RATE) -> Samples:
    """As transformers loads it, by way of librosa: one channel, resampled, as long as its rounding up says."""
    samples, own = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)
    mono: Samples = samples.mean(axis=1)
    if own == rate:
        return mono
    length = int(np.ceil(len(mono) * (float(rate) / own)))
    found: Samples = soxr.resample(mono, own, rate, "soxr_hq")
    return np.pad(found, (0, max(0, length - len(found))))[:length]
