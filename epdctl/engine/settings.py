"""What clients' settings do to logits before tokens are chosen, and how likely the model itself found those. Pure.

The order is vLLM's: what may not be, then bias, then penalties; temperature and the cuts come after that. All sequences
of a step go together; what is said of one does not depend on the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from epdctl.wire.serve import Likelihood, Sampling

__all__ = ["Ask", "adjusted", "likelihoods"]

_COLD = 1e-5  # a temperature below is none: scores divided by it would leave the numbers


@dataclass(frozen=True, slots=True)
class Ask:
    """One sequence's wish for a token behind ``tokens``, which are the sequence so far."""

    sampling: Sampling
    tokens: Sequence[int]

    @property
    def position(self) -> int:
        return len(self.tokens)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < _COLD

    @property
    def ordered(self) -> bool:
        """It takes the order of tokens to say which of them may be drawn."""
        return not self.greedy and (self.sampling.top_k > 0 or self.sampling.top_p < 1)

    @property
    def forbidden(self) -> Sequence[int]:
        answered = len(self.tokens) - self.sampling.answer_from
        return self.sampling.stop_token_ids if answered < self.sampling.min_tokens else ()


def adjusted(logits: torch.Tensor, asks: Sequence[Ask]) -> torch.Tensor:
    """``logits`` [n, vocab]; the same tensor where nobody asks for a change.

    Presence and frequency look at the answer alone, repetition at the prompt too.
    """
    if not any(ask.sampling.adjusts for ask in asks):
        return logits
    scores = logits.float().clone()
    _forbid(scores, asks)
    _bias(scores, asks)
    _penalise_repetition(scores, asks)
    _penalise_presence(scores, asks)
    return scores


def likelihoods(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Likelihood]:
    """Of each row's token and of the likeliest ones, ``tops`` of them, as the model itself sees them: no setting has
    touched ``logits`` [n, vocab]. One copy comes back from the device."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))
    values, ids = logprobs.topk(min(max(tops), logprobs.shape[1]), dim=1)
    told = torch.cat([own.double(), values.double(), ids.double()], dim=1).tolist()
    return [_likelihood(row, top) for row, top in zip(told, tops, strict=True)]


def _likelihood(told: Sequence[float], top: int) -> Likelihood:
    """``told``: the token's own, values, and as many ids."""
    most = len(told) // 2
    values, ids = told[1 : 1 + most][:top], told[1 + most :][:top]
    return Likelihood(logprob=told[0], top=[(int(token), value) for token, value in zip(ids, values, strict=True)])


def _forbid(scores: torch.Tensor, asks: Sequence[Ask]) -> None:
    places = [_Places.of(row, ask.forbidden, 0.0) for row, ask in enumerate(asks)]
    for rows, ids, _ in _together(scores, places):
        scores[rows, ids] = -torch.inf


def _bias(scores: torch.Tensor, asks: Sequence[Ask]) -> None:
    biases = ((row, ask.sampling.logit_bias) for row, ask in enumerate(asks))
    places = [_Places.of(row, [*bias], list(bias.values())) for row, bias in biases]
    for rows, ids, values in _together(scores, places):
        scores[rows, ids] += values


def _penalise_repetition(scores: torch.Tensor, asks: Sequence[Ask]) -> None:
    """A token that stands there twice is written twice, with the same value."""
    penalties = ((row, ask, ask.sampling.repetition_penalty) for row, ask in enumerate(asks))
    places = [_Places.of(row, ask.tokens, penalty) for row, ask, penalty in penalties if penalty != 1]
    for rows, ids, factors in _together(scores, places):
        held = scores[rows, ids]
        scores[rows, ids] = torch.where(held > 0, held / factors, held * factors)


def _penalise_presence(scores: torch.Tensor, asks: Sequence[Ask]) -> None:
    for rows, ids, values in _together(scores, _counted(asks)):
        scores[rows, ids] -= values


def _counted(asks: Iterable[Ask]) -> Iterator[_Places]:
    for row, ask in enumerate(asks):
        sampling = ask.sampling
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = Counter(ask.tokens[sampling.answer_from :])
            values = torch.tensor(list(counts.values())) * sampling.frequency_penalty + sampling.presence_penalty
            yield _Places(row, torch.tensor(list(counts), dtype=torch.int64), values)


@dataclass(frozen=True, slots=True)
class _Places:
    """Some tokens of one row, and a value for each; on the CPU."""

    row: int
    ids: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, row: int, ids: Sequence[int], values: float | Sequence[float]) -> _Places:
        held = torch.tensor(values, dtype=torch.float32).expand(len(ids))
        return cls(row, torch.tensor(ids, dtype=torch.int64), held)


def _together(
    scores: torch.Tensor, places: Iterable[_Places]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows, ids and values of all, where ``scores`` are; nothing where there are none. Ids beyond the vocabulary, which
    placeholders may have, are left out."""
    some = [each for each in places if len(each.ids)]
    if not some:
        return
    rows = torch.cat([torch.full_like(each.ids, each.row) for each in some])
    ids, values = torch.cat([each.ids for each in some]), torch.cat([each.values for each in some])
    known = ids < scores.shape[1]
    yield rows[known].to(scores.device), ids[known].to(scores.device), values[known].to(scores.device)
