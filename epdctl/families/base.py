"""What a model family is without torch: sizes, placeholders and end tokens. One module of this package per family.

The gateway knows from here how long a prompt will be before any picture is encoded; the torch half of the same family
stands in ``engine/families``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from epdctl.wire.serve import PromptItem

__all__ = ["Family", "Picture", "Prompt"]


@dataclass(frozen=True, slots=True)
class Picture:
    """What the family's processor makes of one picture."""

    grid: tuple[int, int, int]  # the family's own three numbers, from which its tower and its positions know the rest
    rows: int  # embeddings, and so placeholder tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with every picture's placeholder repeated to its length, and where each item stands."""

    tokens: list[int]
    items: list[PromptItem]


class Family(Protocol):
    """Built as ``Family(directory)`` from a checkpoint's json files. Raises LoadError when one is missing or odd."""

    def __init__(self, directory: Path) -> None: ...

    @property
    def end_token_ids(self) -> Sequence[int]:
        """The tokens at which ``generate`` stops: generation_config's, else config's eos_token_id."""
        ...

    def picture_tokens(self, width: int, height: int, of: int) -> Picture:
        """``of``: pictures in the whole request (some families tile a lone one). Raises ValueError with the reason
        for a picture the processor refuses (Qwen: an aspect ratio above 200)."""
        ...

    def expand(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> Prompt:
        """``tokens``: the tokenised chat template, one placeholder per picture. Raises ValueError on another count."""
        ...
