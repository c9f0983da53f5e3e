"""What a model family is without torch: sizes, placeholders and end tokens. One module of this package per family.

The gateway knows from here how long a prompt will be before any picture or sound is encoded; the torch half of the same
family stands in ``engine/families``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from epdctl.ids import Modality
from epdctl.wire.serve import PromptItem

__all__ = ["Family", "Header", "PictureHeader", "Prompt", "SoundHeader", "Span", "VideoHeader"]


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """``width`` and ``height``: pixels of the upright picture."""

    modality: ClassVar[Modality] = Modality.IMAGE

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SoundHeader:
    """``frames``: samples of each channel, ``rate`` of them in a second."""

    modality: ClassVar[Modality] = Modality.AUDIO

    frames: int
    rate: int


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """``frames`` of ``width`` x ``height`` pixels, upright, ``rate`` of them in a second. ``rate`` is None for frames
    that somebody has chosen already: all of them are shown."""

    modality: ClassVar[Modality] = Modality.VIDEO

    frames: int
    rate: float | None
    width: int
    height: int


Header = PictureHeader | SoundHeader | VideoHeader  # what a file says of itself, read before anything in it is decoded


@dataclass(frozen=True, slots=True)
class Span:
    """What the family's processor makes of one medium."""

    grid: tuple[int, int, int]  # the family's own three numbers, from which its tower and its positions know the rest
    rows: int  # embeddings, and so placeholder tokens
    modality: Modality = Modality.IMAGE
    seconds: float = 0.0  # of a video, from one step of its grid's time to the next


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every medium's placeholder repeated to its length, and where each item stands."""

    tokens: list[int]
    items: list[PromptItem]  # in the prompt's order
    sources: list[int]  # of each item: which of the request's media it is


class Family(Protocol):
    """Built as ``Family(directory)`` from a checkpoint's json files. Raises LoadError when one is missing or odd."""

    def __init__(self, directory: Path) -> None: ...

    @property
    def modalities(self) -> Sequence[Modality]:
        """What it takes beside text. The first is what its encoders prove themselves with."""
        ...

    def obstacle(self, modality: Modality) -> str | None:
        """Why what the model itself would take is not taken here; None where nothing more is known than that."""
        ...

    @property
    def end_token_ids(self) -> Sequence[int]:
        """The tokens at which ``generate`` stops: generation_config's, else config's eos_token_id."""
        ...

    def span(self, header: Header, of: int) -> Span:
        """``of``: media of its kind in the request (some families tile a lone picture). Raises ValueError with the
        reason for one the processor refuses (Qwen: an aspect ratio above 200), or that the family does not take."""
        ...

    def expand(self, tokens: Sequence[int], spans: Sequence[Span]) -> Prompt:
        """``tokens``: the tokenised chat template, one placeholder per medium; ``spans``: in the request's order, which
        a template keeps within a modality. Raises ValueError on another count."""
        ...
