"""What a GPU does once per process is done at load: kernels fetched, libraries opened, memory taken from the driver."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epdctl.engine.api import LoadProgress, NewSequence
from epdctl.engine.pages import pages_for
from epdctl.wire.serve import Sampling

if TYPE_CHECKING:
    from epdctl.engine.core import Engine

__all__ = ["warm_up"]

TURNS = 3  # prompts of a chunk and a half, a quarter of that, …: products of few rows have kernels of their own
TOGETHER = 2  # sequences of a turn: a batch of several is not what one alone is
ANSWER = 4  # tokens


def warm_up(engine: Engine, progress: LoadProgress) -> None:
    """A few answers, of two sequences each, to prompts that take two steps, if the pool has room, and shorter ones.

    For an engine that has no work, before anybody owns a page: its first pages are written. The tokens do not matter,
    nor whether the model finds numbers for them.
    """
    for turn in range(TURNS):
        progress(turn, TURNS)
        for new in _sequences(engine, engine.config.chunk_tokens * 3 // 2 // 4**turn):
            engine.admit(new)
        while engine.has_work:
            engine.step()
    progress(TURNS, TURNS)


def _sequences(engine: Engine, tokens: int) -> list[NewSequence]:
    """Those that fit into the pool; each in pages of its own."""
    size = engine.kv.layout.page_size
    tokens = max(1, min(tokens, engine.kv.pages // TOGETHER * size - ANSWER))
    needed = pages_for(tokens + ANSWER, size)
    return [
        NewSequence(
            id=f"warm-up {number}",
            tokens=[0] * tokens,
            sampling=Sampling(max_tokens=ANSWER, logprobs=1),
            pages=range(number * needed, (number + 1) * needed),
            max_new_tokens=ANSWER,
        )
        for number in range(min(TOGETHER, engine.kv.pages // needed))
    ]
