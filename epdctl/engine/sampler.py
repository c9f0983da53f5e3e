"""From logits to a token. Noise is a function of (seed, position) alone: an answer does not depend on its neighbours in
the batch, and one that is taken up again goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from epdctl.engine.settings import adjusted
from epdctl.wire.serve import Sampling

__all__ = ["NonFiniteLogits", "draw", "gumbel", "sample"]

Floats = npt.NDArray[np.float64]


class NonFiniteLogits(ArithmeticError):
    """The model gave NaN or infinity where a number was due."""


def draw(logits: torch.Tensor, sampling: Sampling, tokens: Sequence[int]) -> int:
    """The token behind ``tokens``, which are the sequence so far. ``logits``: [vocab]. Raises NonFiniteLogits."""
    _refuse_non_finite(logits, len(tokens))
    return _pick(adjusted(logits, sampling, tokens), sampling, len(tokens))


def sample(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Without penalties. ``position``: index in the sequence of the token to be drawn. Raises NonFiniteLogits."""
    _refuse_non_finite(logits, position)
    return _pick(logits, sampling, position)


def _refuse_non_finite(logits: torch.Tensor, position: int) -> None:
    bad = int((~torch.isfinite(logits)).sum())
    if bad:
        raise NonFiniteLogits(f"{bad} of {logits.numel()} logits at position {position} are not finite")


def _pick(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    if sampling.temperature <= 0:
        return int(logits.argmax())
    scores = _above_min_p(logits.double().cpu().numpy() / sampling.temperature, sampling.min_p)
    kept = _within_top_p(_within_top_k(scores, sampling.top_k), sampling.top_p)
    return int(np.argmax(kept + gumbel(sampling.seed, position, kept.size)))


def gumbel(seed: int, position: int, size: int) -> Floats:
    """Standard Gumbel noise: adding it to scores and taking the largest draws from their softmax.

    Taken from the raw words of a counter-based generator, so that no library's way to make floats can change it. The
    position is the counter's second word: the first counts within one draw, and two draws never overlap.
    """
    words = np.random.Philox(key=seed % 2**64, counter=[0, position, 0, 0]).random_raw(size)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0 nor 1
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def _above_min_p(scores: Floats, min_p: float) -> Floats:
    """Tokens whose share is at least ``min_p`` of the likeliest one's."""
    if min_p <= 0:
        return scores
    return _only(scores, np.flatnonzero(scores >= scores.max() + np.log(min_p)))


def _within_top_k(scores: Floats, top_k: int) -> Floats:
    if not 0 < top_k < scores.size:
        return scores
    return _only(scores, np.argsort(-scores, kind="stable")[:top_k])


def _within_top_p(scores: Floats, top_p: float) -> Floats:
    """The likeliest tokens that together reach ``top_p``; the first one always."""
    if top_p >= 1:
        return scores
    order = np.argsort(-scores, kind="stable")
    shares = np.exp(scores[order] - scores[order[0]])
    before = (np.cumsum(shares) - shares) / shares.sum()
    before[0] = -1.0  # the likeliest stays even under top_p 0
    return _only(scores, order[before < top_p])


def _only(scores: Floats, keep: npt.NDArray[np.intp]) -> Floats:
    result = np.full_like(scores, -np.inf)
    result[keep] = scores[keep]
    return result
