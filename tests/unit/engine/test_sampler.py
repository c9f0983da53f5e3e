"""Sampling: a pure function of logits, settings and position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from msgspec import structs

from epdctl.engine.sampler import NonFiniteLogits, gumbel, sample
from epdctl.wire.serve import Sampling

LOGITS = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.2]))


def shares(changes: dict[str, float], draws: int = 4000) -> list[float]:
    sampling = structs.replace(Sampling(temperature=1.0, seed=3), **changes)
    tokens = [sample(LOGITS, sampling, position) for position in range(draws)]
    return [tokens.count(token) / draws for token in range(4)]


def test_zero_temperature_takes_the_likeliest() -> None:
    assert sample(LOGITS, Sampling(temperature=0.0, seed=9), 5) == 0


def test_draws_follow_the_softmax() -> None:
    assert shares({}) == pytest.approx([0.4, 0.1, 0.3, 0.2], abs=0.03)


def test_temperature_sharpens() -> None:
    weights = [p**2 for p in (0.4, 0.1, 0.3, 0.2)]
    assert shares({"temperature": 0.5}) == pytest.approx([w / sum(weights) for w in weights], abs=0.03)


def test_top_k_keeps_the_best() -> None:
    assert shares({"top_k": 2}) == pytest.approx([4 / 7, 0, 3 / 7, 0], abs=0.03)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert shares({"top_p": 0.65}) == pytest.approx([4 / 7, 0, 3 / 7, 0], abs=0.03)
    assert shares({"top_p": 0.0}) == [1, 0, 0, 0]


def test_the_same_seed_and_position_draw_the_same_and_others_do_not() -> None:
    flat = torch.zeros(1000)

    def draw(seed: int, position: int) -> int:
        return sample(flat, Sampling(temperature=1.0, seed=seed), position)

    assert draw(1, 7) == draw(1, 7)
    assert len({draw(seed, 7) for seed in range(40)}) > 30
    assert len({draw(1, position) for position in range(40)}) > 30
    assert draw(-1, 0) == draw(2**64 - 1, 0)  # any integer a client sends is a seed


def test_noise_of_neighbouring_positions_does_not_overlap() -> None:
    here, there = gumbel(5, 10, 4096), gumbel(5, 11, 4096)
    assert not set(here.tolist()) & set(there.tolist())


def test_noise_is_standard_gumbel_and_stays_what_it_is() -> None:
    noise = gumbel(0, 0, 200_000)
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    pinned = [-0.43610187674653694, -0.39233910805590716, 3.0902145879478167]
    assert gumbel(42, 17, 3).tolist() == pytest.approx(pinned, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_numbers_that_are_none_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(NonFiniteLogits, match="1 of 4 logits at position 12"):
        sample(torch.tensor([0.0, bad, 1.0, 2.0]), Sampling(temperature=temperature), 12)
