"""From logits to tokens: all sequences of a step together, on the logits' own device.

Noise is a function of (seed, position, id) alone: an answer does not depend on its neighbours in the batch, and one
that is taken up again goes on as it would have. Cuts come first, so that only what they leave needs noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from epdctl.engine.cuts import WIDTH, Wishes, drawn_freely, drawn_within
from epdctl.engine.settings import Ask, adjusted, likelihoods
from epdctl.wire.serve import Likelihood

__all__ = ["Drawn", "draw"]

_ROWS = 8  # that need their whole vocabulary in order, at once on a GPU

Found = tuple[torch.Tensor, torch.Tensor]  # tokens, and whether the cuts were found within the width


@dataclass(frozen=True, slots=True)
class Drawn:
    """``failed``: the model gave NaN or infinity where a number was due, and there is no token."""

    token: int | None = None
    likelihood: Likelihood | None = None  # of ``token``, where its sampling asks for logprobs
    failed: str | None = None


def draw(logits: torch.Tensor, asks: Sequence[Ask]) -> list[Drawn]:
    """One for each row of ``logits`` [n, vocab]. One copy comes back from the device; one more for log-probabilities,
    and for rows whose cuts leave more than WIDTH tokens."""
    if not asks:
        return []
    finite = torch.isfinite(logits.amin(1)) & torch.isfinite(logits.amax(1))
    scores = adjusted(logits, asks)
    tokens, settled, sound = torch.stack([*_drawn(scores, asks), finite]).tolist()
    wide = [row for row in range(len(asks)) if sound[row] and not settled[row]]
    for row, token in zip(wide, _among_all(scores, asks, wide), strict=True):
        tokens[row] = token
    likely = _likely(logits, asks, tokens)
    return [
        Drawn(tokens[row], likely.get(row)) if sound[row] else Drawn(None, failed=_fault(logits[row], ask))
        for row, ask in enumerate(asks)
    ]


def _likely(logits: torch.Tensor, asks: Sequence[Ask], tokens: Sequence[int]) -> dict[int, Likelihood]:
    """By row, of those that ask for it."""
    tops = {row: ask.sampling.logprobs for row, ask in enumerate(asks) if ask.sampling.logprobs is not None}
    if not tops:
        return {}
    rows = list(tops)
    found = likelihoods(_taken(logits, rows), [tokens[row] for row in rows], list(tops.values()))
    return dict(zip(rows, found, strict=True))


def _among_all(scores: torch.Tensor, asks: Sequence[Ask], rows: Sequence[int]) -> list[int]:
    """The same with the whole vocabulary in order, a few rows at a time."""
    step = 1 if scores.is_cpu else _ROWS
    some = (rows[start : start + step] for start in range(0, len(rows), step))
    return [token for each in some for token in _within(scores, asks, each, scores.shape[1])[0].tolist()]


def _drawn(scores: torch.Tensor, asks: Sequence[Ask]) -> Found:
    tokens = torch.empty(len(asks), dtype=torch.int64, device=scores.device)
    settled = torch.ones_like(tokens)
    for rows, (found, done) in _by_kind(scores, asks):
        at = torch.tensor(rows, device=scores.device)
        tokens[at], settled[at] = found, done.long()
    return tokens, settled


def _by_kind(scores: torch.Tensor, asks: Sequence[Ask]) -> Iterator[tuple[list[int], Found]]:
    """Rows whose ways to a token are alike."""
    greedy = [row for row, ask in enumerate(asks) if ask.greedy]
    free = [row for row, ask in enumerate(asks) if not ask.greedy and not ask.ordered]
    listed = [row for row, ask in enumerate(asks) if ask.ordered and 0 < ask.sampling.top_k < WIDTH]
    rest = sorted({*range(len(asks))} - {*greedy, *free, *listed})
    if greedy:
        found = _taken(scores, greedy).argmax(1)
        yield greedy, (found, torch.ones_like(found))
    if free:
        found = drawn_freely(_taken(scores, free), _wishes(scores, asks, free))
        yield free, (found, torch.ones_like(found))
    if listed:
        yield listed, _within(scores, asks, listed, 1 + max(asks[row].sampling.top_k for row in listed))
    if rest:
        yield rest, _within(scores, asks, rest, WIDTH)


def _within(scores: torch.Tensor, asks: Sequence[Ask], rows: Sequence[int], width: int) -> Found:
    return drawn_within(_taken(scores, rows), _wishes(scores, asks, rows), min(width, scores.shape[1]))


def _wishes(scores: torch.Tensor, asks: Sequence[Ask], rows: Sequence[int]) -> Wishes:
    return Wishes.of([asks[row] for row in rows], scores.shape[1], scores.device)


def _taken(scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Not copied where it is all of them."""
    return scores if len(rows) == len(scores) else scores[torch.tensor(rows, device=scores.device)]


def _fault(logits: torch.Tensor, ask: Ask) -> str:
    bad = int((~torch.isfinite(logits)).sum())
    return f"{bad} of {logits.numel()} logits at position {ask.position} are not finite"
