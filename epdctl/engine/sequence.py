"""One sequence inside the engine: its tokens, its positions, how far it is."""

from __future__ import annotations

import enum

import torch

from epdctl.engine.api import NewSequence
from epdctl.engine.scheduler import Work
from epdctl.wire.serve import FinishReason

__all__ = ["Sequence", "SequenceState"]


class SequenceState(enum.StrEnum):
    WAITING = "waiting"  # admitted; no step has touched it
    RUNNING = "running"
    FINISHED = "finished"


_NEXT = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING}),
    SequenceState.RUNNING: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset[SequenceState](),
}


class Sequence:
    """``positions``: [3, prompt tokens] of M-RoPE; a token behind the prompt has its index + ``rope_delta`` thrice."""

    def __init__(self, new: NewSequence, positions: torch.Tensor, rope_delta: int) -> None:
        self.new = new
        self.tokens = list(new.tokens)
        self.computed = new.computed
        self.rope_delta = rope_delta
        self.state = SequenceState.WAITING
        self._positions = positions

    @property
    def prompt_tokens(self) -> int:
        return len(self.new.tokens)

    @property
    def sampled(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def prompt_done(self) -> bool:
        return self.computed >= self.prompt_tokens

    @property
    def work(self) -> Work:
        return Work(self.new.id, self.computed, len(self.tokens))

    def positions(self, start: int, end: int) -> torch.Tensor:
        """[3, end - start] int64."""
        first = max(start, self.prompt_tokens)
        behind = torch.arange(first, max(first, end), dtype=torch.int64) + self.rope_delta
        return torch.cat([self._positions[:, start:end], behind.expand(3, -1)], dim=1)

    def enter(self, state: SequenceState) -> None:
        """Raises RuntimeError, and changes nothing, on a way that does not exist."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"sequence {self.new.id} cannot go from {self.state} to {state}")
        self.state = state

    def append(self, token: int) -> FinishReason | None:
        """Take a sampled token; says whether it was the last one, and why."""
        self.tokens.append(token)
        if token in self.new.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.sampled >= self.new.max_new_tokens else None
