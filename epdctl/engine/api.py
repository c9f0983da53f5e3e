"""The native engine as its ranks see it: a tower that encodes items, and an engine that steps sequences.

Neither owns a thread or a socket. An object of this module is used from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from epdctl.wire.encode import MediaItem
from epdctl.wire.serve import FinishReason, KvLayout, Likelihood, PromptItem, Sampling

if TYPE_CHECKING:
    from epdctl.engine.attention import PagedBatch

__all__ = [
    "Advance",
    "LanguageModel",
    "LoadProgress",
    "NewSequence",
    "Prepared",
    "StepInput",
    "Tower",
    "Visual",
    "WarmsUp",
]

LoadProgress = Callable[[int, int], None]  # done, total; from any thread


@dataclass(frozen=True, slots=True)
class Prepared:
    """One item after preprocessing, on the CPU. ``pixels``: what the tower begins with: [patches, values of a patch],
    [tiles, 3, height, width], 8-bit [height, width, 3] where the device does the rest, or a clip's [mel bands, frames].
    """

    grid: tuple[int, int, int]  # families.base.Span's
    rows: int  # embeddings to come
    patches: int  # what the forward costs
    pixels: torch.Tensor


@runtime_checkable
class WarmsUp(Protocol):
    """A tower that compiles something: done at load, so that no request waits for it."""

    def warm_up(self, progress: LoadProgress) -> None: ...


class Tower(Protocol):
    """The encoder half of a family. ``width``: values of one embedding row (DeepStack rows included)."""

    @property
    def width(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        """Decode and preprocess one medium; safe on many threads at once. Raises RequestError (400) on bad media."""
        ...

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """One packed forward: a [rows, width] tensor per item, in order, on the tower's device."""
        ...


@dataclass(frozen=True, slots=True)
class Visual:
    """What the rows of a step's items hold beyond the embedding of their placeholder."""

    mask: torch.Tensor  # [tokens] bool: the placeholders of this step
    beyond: torch.Tensor  # [placeholders, row_width - hidden]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One packed forward: the new tokens of several sequences, one behind the other."""

    embeds: torch.Tensor  # [tokens, hidden]
    positions: torch.Tensor  # [3, tokens] int64: time, height, width
    paged: PagedBatch  # where each token's KV goes, and what it may look at
    wanted: torch.Tensor  # [n] int64: rows whose logits are needed
    visual: Visual | None = None  # None too for a step without placeholders


class LanguageModel(Protocol):
    """The language half of a family. Stateless: all that a sequence is lies in its tokens and its pages."""

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def row_width(self) -> int:
        """Values of one row of an item, as the family's tower makes it: the placeholder's embedding comes first."""
        ...

    def layout(self, page_size: int) -> KvLayout: ...

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, hidden]; placeholders get their own embedding, which the caller overwrites."""
        ...

    def positions(self, tokens: Sequence[int], items: Sequence[PromptItem]) -> tuple[torch.Tensor, int]:
        """([3, tokens] int64 on the CPU, rope_delta). Raises RequestError (400) where items and tokens disagree."""
        ...

    def forward(self, step: StepInput) -> torch.Tensor:
        """Writes the step's KV and returns [n, vocab] float32 logits of the wanted rows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A sequence with all the memory it will ever need: pages for ``tokens`` and every token it may still add.

    ``computed`` tokens are in the pages already: 0 for a prompt to prefill; ``len(tokens) - 1`` on a decode rank, where
    ``tokens`` ends with the first token that prefill sampled, and ``rope_delta`` came with it.
    ``max_new_tokens``: tokens the engine samples before it finishes with LENGTH (a prefill rank asks for 1).
    ``embeddings[index]``: [rows, row_width] of the item ``index``; views of slots, read until the prompt is computed.
    """

    id: str
    tokens: Sequence[int]
    items: Sequence[PromptItem] = ()
    embeddings: Mapping[int, torch.Tensor] = field(default_factory=dict)
    sampling: Sampling
    pages: Sequence[int]
    max_new_tokens: int
    computed: int = 0
    rope_delta: int = 0


@dataclass(frozen=True, slots=True)
class Advance:
    """What one step did for one sequence. After ``finished`` or ``failed`` the engine has forgotten it, and its pages
    are the caller's again. With STOP, ``token`` is the end token."""

    id: str
    computed: int  # tokens whose KV is in the pages now
    prompt_done: bool
    token: int | None = None  # sampled in this step
    finished: FinishReason | None = None
    rope_delta: int = 0  # of this sequence; valid from the first step on
    failed: str | None = None  # the model gave numbers that are none: only this sequence is given up, and why
    likelihood: Likelihood | None = None  # of ``token``, where its sampling asks for logprobs
