"""What the next step computes. Pure: it sees counts and returns counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Slice", "Work", "schedule"]


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence: ``computed`` of its ``known`` tokens have their KV."""

    id: str
    computed: int
    known: int

    @property
    def left(self) -> int:
        return self.known - self.computed


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens ``start`` … ``start + count - 1`` of one sequence."""

    id: str
    start: int
    count: int


def schedule(work: Sequence[Work], *, chunk_tokens: int, max_batch: int) -> list[Slice]:
    """``work`` in order of arrival; the first ``max_batch`` of it have a seat, and keep it until they leave.

    Everyone with one token left (an answer being written) gets it in every step; prompts take what is left of
    ``chunk_tokens``, oldest first, and the oldest always at least one token. So nobody starves: a seat moves forward
    for as long as it is taken, and those who wait move up when one ends.
    """
    seated = work[:max_batch]
    answers = [Slice(each.id, each.computed, 1) for each in seated if each.left == 1]
    prompts = [each for each in seated if each.left > 1]
    return answers + _chunks(prompts, max(1, chunk_tokens - len(answers)))


def _chunks(prompts: Sequence[Work], budget: int) -> list[Slice]:
    chunks: list[Slice] = []
    for each in prompts:
        if budget == 0:
            break
        count = min(each.left, budget)
        chunks.append(Slice(each.id, each.computed, count))
        budget -= count
    return chunks
