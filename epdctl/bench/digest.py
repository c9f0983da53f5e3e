"""What bytes lie where, in one number: cheap enough to be taken of every write of a measurement."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["MASK", "change", "digest", "total"]

MASK = 2**63 - 1
WORD_BYTES = 8
CHUNK_WORDS = 1 << 17  # 1 MiB
EVERY_WORDS = 512  # 4 KiB, the smallest thing that is measured
MIXER = 0x9E3779B97F4A7C15


def total(parts: Iterable[torch.Tensor]) -> int:
    """Every byte read once, and nothing else: the words' sum, which does not know their order."""
    return sum(int(part.view(torch.int64).sum()) for part in parts) & MASK


def digest(parts: Iterable[torch.Tensor]) -> int:
    """Of 1-D uint8 ``parts`` of whole words, in their order: another one when a word changes, or its place."""
    found = 0
    for part in parts:
        whole = part.view(torch.int64)
        for start in range(0, whole.numel(), CHUNK_WORDS):
            words = whole[start : start + CHUNK_WORDS]
            places = torch.arange(1, 2 * words.numel(), 2, device=words.device)
            found = (found * MIXER + int((words * places).sum())) & (2**64 - 1)
    return found & MASK


def change(data: torch.Tensor) -> None:
    """A word of every 4 KiB of 1-D uint8 ``data``: no page of it is what it was."""
    data.view(torch.int64)[::EVERY_WORDS].add_(1)
