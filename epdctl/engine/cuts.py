"""Draws of some rows of scores by temperature, top_k, top_p and min_p. Pure, on the scores' own device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from epdctl.engine.noise import gumbel, gumbel_of, gumbel_rows, signed
from epdctl.engine.settings import Ask

__all__ = ["WIDTH", "Wishes", "drawn_freely", "drawn_within"]

WIDTH = 1024  # of the likeliest tokens, among which cuts are looked for first
_ID = 0xFFFFFFFF  # the half of a key that is the token
_ROWS = 16  # of a whole vocabulary in double precision, at once on a GPU


@dataclass(frozen=True, slots=True)
class Wishes:
    """Of some rows, each [n, 1]."""

    temperature: torch.Tensor
    top_p: torch.Tensor  # infinite where there is none
    floor: torch.Tensor  # log of min_p
    top_k: torch.Tensor  # the size of the vocabulary where there is none
    seed: torch.Tensor
    position: torch.Tensor
    floored: bool  # some row has a min_p
    shared: bool  # some row has a top_p and no top_k: it needs to know what all its tokens weigh together

    @classmethod
    def of(cls, asks: Sequence[Ask], size: int, device: torch.device) -> Wishes:
        floats = torch.tensor([_floats(ask) for ask in asks], dtype=torch.float64).to(device)
        whole = torch.tensor([_integers(ask, size) for ask in asks], dtype=torch.int64).to(device)
        temperature, top_p, floor = torch.split(floats, 1, dim=1)
        top_k, seed, position = torch.split(whole, 1, dim=1)
        floored = any(ask.sampling.min_p > 0 for ask in asks)
        shared = any(ask.sampling.top_p < 1 and not 0 < ask.sampling.top_k < WIDTH for ask in asks)
        return cls(temperature, top_p, floor, top_k, seed, position, floored, shared)

    def some(self, rows: slice) -> Wishes:
        return Wishes(
            self.temperature[rows],
            self.top_p[rows],
            self.floor[rows],
            self.top_k[rows],
            self.seed[rows],
            self.position[rows],
            self.floored,
            self.shared,
        )


def _floats(ask: Ask) -> tuple[float, float, float]:
    sampling = ask.sampling
    floor = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
    return sampling.temperature, sampling.top_p if sampling.top_p < 1 else math.inf, floor


def _integers(ask: Ask, size: int) -> tuple[int, int, int]:
    top_k = ask.sampling.top_k
    return top_k if 0 < top_k < size else size, signed(ask.sampling.seed), ask.position


def drawn_freely(scores: torch.Tensor, wishes: Wishes) -> torch.Tensor:
    """[n] tokens, by temperature and min_p alone: these need no order."""
    return torch.cat([_drawn_freely(some, theirs) for some, theirs in _apart(scores, wishes)])


def _drawn_freely(scores: torch.Tensor, wishes: Wishes) -> torch.Tensor:
    held = scores.double().div_(wishes.temperature)
    if wishes.floored:
        held.masked_fill_(held < held.amax(1, keepdim=True) + wishes.floor, -torch.inf)
    return held.add_(_noise_of_all(wishes, held)).argmax(1)


def drawn_within(scores: torch.Tensor, wishes: Wishes, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] tokens, and whether the ``width`` likeliest were enough to find them: where not, the token means nothing."""
    ids = _likeliest(scores, width)
    held = scores.gather(1, ids).double().div_(wishes.temperature)
    kept = (held >= held[:, :1] + wishes.floor) & (torch.arange(width, device=ids.device) < wishes.top_k)
    unknown = kept[:, -1:] & (wishes.top_k < scores.shape[1])  # what top_k leaves beyond the width
    kept &= _before(scores, held, kept, wishes) < wishes.top_p
    kept[:, 0] = True  # even under a top_p of 0
    best = held.add_(_noise(wishes, ids, kept, scores.shape[1])).masked_fill_(~kept, -torch.inf).argmax(1, keepdim=True)
    settled = ~(kept[:, -1:] | unknown) if width < scores.shape[1] else torch.ones_like(unknown)
    return ids.gather(1, best).squeeze(1), settled.squeeze(1)


def _before(scores: torch.Tensor, held: torch.Tensor, kept: torch.Tensor, wishes: Wishes) -> torch.Tensor:
    """Of all that the other cuts leave, the share of those that are likelier than each."""
    shares = (held - held[:, :1]).exp_().masked_fill_(~kept, 0.0)
    sums = shares.cumsum(1)  # from the first on, so that no zero behind them changes how they are rounded
    whole = sums[:, -1:]
    if wishes.shared and held.shape[1] < scores.shape[1]:
        whole = torch.where(kept[:, -1:], _mass(scores, wishes), whole)
    return sums.sub(shares).div_(whole)


def _mass(scores: torch.Tensor, wishes: Wishes) -> torch.Tensor:
    """[n, 1]: of all tokens that min_p leaves, the likeliest of them being 1."""
    return torch.cat([_mass_of(some, theirs) for some, theirs in _apart(scores, wishes)])


def _mass_of(scores: torch.Tensor, wishes: Wishes) -> torch.Tensor:
    held = scores.double().div_(wishes.temperature)
    held.sub_(held.amax(1, keepdim=True))
    if wishes.floored:
        held.masked_fill_(held < wishes.floor, -torch.inf)
    return held.exp_().sum(1, keepdim=True)


def _apart(scores: torch.Tensor, wishes: Wishes) -> Iterator[tuple[torch.Tensor, Wishes]]:
    """Rows that are worked at together over the whole vocabulary, in double precision: on a CPU one lies in the cache,
    and on a GPU not all in memory."""
    step = 1 if _numpys(scores) else _ROWS
    for start in range(0, len(scores), step):
        rows = slice(start, start + step)
        yield scores[rows], wishes.some(rows)


def _noise(wishes: Wishes, ids: torch.Tensor, kept: torch.Tensor, size: int) -> torch.Tensor:
    """[n, width]. On a CPU every word counts: a few are made one by one, many by numpy."""
    if not _numpys(ids):
        return gumbel_of(wishes.seed, wishes.position, ids)
    if ids.shape[1] == size:
        each = zip(wishes.seed, wishes.position, ids, strict=True)
        return torch.stack([_by_numpy(seed, at, row)[row] for seed, at, row in each])
    noise = torch.zeros(ids.shape, dtype=torch.float64)
    rows, places = kept.nonzero(as_tuple=True)
    noise[rows, places] = gumbel_of(wishes.seed[rows, 0], wishes.position[rows, 0], ids[rows, places])
    return noise


def _noise_of_all(wishes: Wishes, held: torch.Tensor) -> torch.Tensor:
    """[n, vocab]; on a CPU for one row."""
    if _numpys(held):
        return _by_numpy(wishes.seed, wishes.position, held[0])
    return gumbel_rows(wishes.seed, wishes.position, held.shape[1])


def _numpys(tensor: torch.Tensor) -> bool:
    """It lies where numpy can work at it, whose sort and noise are many times as fast as torch's on a CPU."""
    return tensor.is_cpu


def _by_numpy(seed: torch.Tensor, position: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gumbel(int(seed), int(position), len(row)))


def _likeliest(scores: torch.Tensor, width: int) -> torch.Tensor:
    """[n, width] tokens in their order; of equals the first comes first."""
    if _numpys(scores):
        return torch.stack([_likeliest_of(row, width) for row in scores])
    starts = range(0, len(scores), _ROWS)
    return torch.cat([_likeliest_of_some(scores[start : start + _ROWS], width) for start in starts])


def _likeliest_of_some(scores: torch.Tensor, width: int) -> torch.Tensor:
    keys = _keys(scores)
    least = keys.topk(width, dim=1, largest=False).values if width < keys.shape[1] else keys.sort(dim=1).values
    return least & _ID


def _likeliest_of(row: torch.Tensor, width: int) -> torch.Tensor:
    keys = _keys(row).numpy()
    least = np.partition(keys, width - 1)[:width] if width < len(keys) else keys
    return torch.from_numpy(np.sort(least)) & _ID


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Integers that ascend as the scores descend, and then as the tokens ascend; no two are the same."""
    bits = (scores.float() + 0.0).view(torch.int32)  # -0 is 0
    ascending = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return (~ascending).long() << 32 | torch.arange(scores.shape[-1], device=scores.device)
