"""What a client's settings do to logits before a token is chosen, and how likely the model itself found it. Pure.

The order is vLLM's: what may not be, then bias, then penalties; temperature and the cuts come after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from epdctl.wire.serve import Likelihood, Sampling

__all__ = ["adjusted", "likelihood"]


def adjusted(logits: torch.Tensor, sampling: Sampling, tokens: Sequence[int]) -> torch.Tensor:
    """``logits`` [vocab] for the token behind ``tokens``; the same tensor where nothing asks for a change.

    Presence and frequency look at the answer alone, repetition at the prompt too.
    """
    if not sampling.adjusts:
        return logits
    scores = logits.float().clone()
    if len(tokens) - sampling.answer_from < sampling.min_tokens:
        scores[_ids([*sampling.stop_token_ids], scores)] = -torch.inf
    for token, bias in sampling.logit_bias.items():
        if token < len(scores):
            scores[token] += bias
    if sampling.looks_back:
        _penalise(scores, sampling, tokens)
    return scores


def likelihood(logits: torch.Tensor, token: int, top: int) -> Likelihood:
    """Of ``token`` and of the ``top`` likeliest, as the model itself sees them: no setting has touched ``logits``."""
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    best = list(zip(ids.tolist(), values.tolist(), strict=True))
    return Likelihood(logprob=float(logprobs[token]), top=best)


def _penalise(scores: torch.Tensor, sampling: Sampling, tokens: Sequence[int]) -> None:
    counts = torch.bincount(_ids(tokens[sampling.answer_from :], scores), minlength=len(scores))
    if sampling.repetition_penalty != 1:
        seen = _ids(sorted(set(tokens)), scores)
        held = scores[seen]
        factor = sampling.repetition_penalty
        scores[seen] = torch.where(held > 0, held / factor, held * factor)
    scores -= counts * sampling.frequency_penalty + (counts > 0) * sampling.presence_penalty


def _ids(tokens: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
    known = [token for token in tokens if token < len(scores)]
    return torch.tensor(known, dtype=torch.int64, device=scores.device)
