"""Qwen2-Audio without torch: how many tokens a sound clip becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdctl.families.base import Header, SoundHeader, Span
from epdctl.families.files import read_feature_extractor
from epdctl.families.media import MediaFamily
from epdctl.ids import Modality

__all__ = ["Qwen2Audio", "SoundRule"]


@dataclass(frozen=True)
class SoundRule:
    """What the feature extractor makes of a clip, and the tower of that. The defaults are the extractor's own."""

    rate: int = 16_000  # samples a second
    hop: int = 160  # samples from one frame of mel bands to the next
    seconds: int = 30  # what is heard of a clip; of the rest nothing is

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> SoundRule:
        return cls(
            rate=config.get("sampling_rate", cls.rate),
            hop=config.get("hop_length", cls.hop),
            seconds=config.get("chunk_length", cls.seconds),
        )

    @property
    def most_samples(self) -> int:
        return self.seconds * self.rate

    @property
    def most_frames(self) -> int:
        return self.most_samples // self.hop

    def samples(self, header: SoundHeader) -> int:
        """At the model's rate, before any are cut off. The order of float operations is librosa's, with which
        transformers loads sound: one too many makes a frame."""
        return math.ceil(header.frames * (float(self.rate) / header.rate))

    def frames(self, samples: int) -> int:
        """Of mel bands, those that silence fills up left out."""
        return min(-(-min(samples, self.most_samples) // self.hop), self.most_frames)


def positions(frames: int) -> int:
    """What the tower's convolutions leave of them: one of two."""
    return (frames - 1) // 2 + 1


def rows(frames: int) -> int:
    """The tower's last step takes pairs of positions together, and drops one that is left over."""
    return positions(frames) // 2


class Qwen2Audio(MediaFamily):
    """Implements families.base.Family. A grid is (1, 1, frames of mel bands)."""

    placeholders = {Modality.AUDIO: ("audio_token_id", "audio_token_index")}  # noqa: RUF012  (a class variable above)

    def __init__(self, directory: Path) -> None:
        self.rule = SoundRule.read(read_feature_extractor(directory))
        super().__init__(directory)

    def span(self, header: Header, of: int) -> Span:
        """``of`` changes nothing here. A clip beyond what the model hears is as long as that."""
        if not isinstance(header, SoundHeader):
            raise ValueError(f"this model takes no {header.modality.noun}s")
        frames = self.rule.frames(self.rule.samples(header))
        if rows(frames) < 1:
            length, silent = (1000 * each for each in (header.frames / header.rate, 2 * self.rule.hop / self.rule.rate))
            raise ValueError(f"a sound clip of {length:.3g} ms is too short: the model needs more than {silent:.3g}")
        return Span(grid=(1, 1, frames), rows=rows(frames), modality=Modality.AUDIO)
