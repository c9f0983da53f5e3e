"""Standard Gumbel noise for the ids of a vocabulary, as a function of (seed, position, id) alone: adding it to scores
and taking the largest draws from their softmax.

Taken from the raw words of Philox4x64-10, a counter-based generator, so that no library's way to make floats can change
it. The position is the counter's second word: the first counts within one draw, four ids to a count, and two draws
never overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["gumbel", "gumbel_of", "gumbel_rows", "signed"]

Floats = npt.NDArray[np.float64]

_ROUNDS = 10
_PER_COUNT = 4
_HALF = 0xFFFFFFFF  # of a word


def signed(word: int) -> int:
    """The same 64 bits as torch has them: it can multiply only signed ones."""
    return (word + 2**63) % 2**64 - 2**63


_MULTIPLIERS = tuple(map(signed, (0xD2E7470EE14C6C93, 0xCA5A826395121157)))
_STEPS = tuple(map(signed, (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)))


def gumbel(seed: int, position: int, size: int) -> Floats:
    """Of the ids below ``size``, by numpy's generator: for many ids nothing else on a CPU is as fast."""
    words = np.random.Philox(key=seed % 2**64, counter=[0, position, 0, 0]).random_raw(size)
    noise: Floats = (words >> np.uint64(11)).astype(np.float64)
    noise += 0.5
    noise *= 2.0**-53
    for _ in range(2):
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    return noise


def gumbel_of(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same noise for some ids. All int64, and the seeds as signed words; these and the positions broadcast."""
    words = _counted(seeds, positions, ids // _PER_COUNT)
    return _standard(words.gather(0, (ids % _PER_COUNT).unsqueeze(0)).squeeze(0))


def gumbel_rows(seeds: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """[n, size] for ``seeds`` and ``positions`` [n, 1]: the same noise for all ids below ``size``."""
    counts = torch.arange(-(-size // _PER_COUNT), device=seeds.device)
    words = _counted(seeds, positions, counts.expand(len(seeds), -1))
    return _standard(words.movedim(0, -1).flatten(-2)[..., :size])


def _standard(words: torch.Tensor) -> torch.Tensor:
    uniform = ((words >> 11 & (1 << 53) - 1).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _counted(seeds: torch.Tensor, positions: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[4, *shape]: the four words of each count. numpy counts from 1."""
    seeds, positions, zeros = seeds.expand_as(counts), positions.expand_as(counts), torch.zeros_like(counts)
    shape = (2, *([1] * counts.dim()))
    multipliers, steps = (torch.tensor(pair, device=counts.device).view(shape) for pair in (_MULTIPLIERS, _STEPS))
    even, odd, keys = torch.stack([counts + 1, zeros]), torch.stack([positions, zeros]), torch.stack([seeds, zeros])
    for _ in range(_ROUNDS):
        high, low = _product(even, multipliers)
        even, odd = high.flip(0) ^ odd ^ keys, low.flip(0)
        keys = keys + steps
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def _product(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low word of unsigned products. Sums and products of int64 keep their low 64 bits."""
    first_high, first_low, second_high, second_low = _high(first), first & _HALF, _high(second), second & _HALF
    one, other = first_high * second_low, first_low * second_high
    carried = _high(first_low * second_low) + (one & _HALF) + (other & _HALF)
    return first_high * second_high + _high(one) + _high(other) + _high(carried), first * second


def _high(words: torch.Tensor) -> torch.Tensor:
    return words >> 32 & _HALF
