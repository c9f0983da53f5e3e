"""Sampling: a pure function of logits, settings and position, whoever else is in the batch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from msgspec import structs

from epdctl.engine import cuts
from epdctl.engine.cuts import WIDTH
from epdctl.engine.noise import gumbel, gumbel_of, gumbel_rows, signed
from epdctl.engine.sampler import Drawn, draw
from epdctl.engine.settings import Ask
from epdctl.wire.serve import Sampling

LOGITS = torch.log(torch.tensor([0.4, 0.1, 0.3, 0.2]))
LARGE = 20_000  # a vocabulary beyond WIDTH


def tokens(logits: torch.Tensor, sampling: Sampling, positions: Sequence[int]) -> list[int | None]:
    rows = logits.expand(len(positions), -1)
    return [drawn.token for drawn in draw(rows, [Ask(sampling, range(position)) for position in positions])]


def shares(changes: dict[str, float], draws: int = 4000) -> list[float]:
    found = tokens(LOGITS, structs.replace(Sampling(temperature=1.0, seed=3), **changes), range(draws))
    return [found.count(token) / draws for token in range(4)]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-6])
def test_no_temperature_takes_the_likeliest(temperature: float) -> None:
    assert tokens(LOGITS, Sampling(temperature=temperature, top_p=0.9, seed=9), range(50)) == [0] * 50


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

    def drawn(seed: int, position: int) -> int | None:
        return tokens(flat, Sampling(temperature=1.0, seed=seed), [position])[0]

    assert drawn(1, 7) == drawn(1, 7)
    assert len({drawn(seed, 7) for seed in range(40)}) > 30
    assert len({drawn(1, position) for position in range(40)}) > 30
    assert drawn(-1, 0) == drawn(2**64 - 1, 0)  # any integer a client sends is a seed


# -- against a plain one, and in company --


def plainly(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """All tokens in order, cut one way after the other, noise for each: one sequence at a time."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores = logits.double().numpy() / sampling.temperature
    if sampling.min_p > 0:
        scores[scores < scores.max() + math.log(sampling.min_p)] = -np.inf
    order = np.argsort(-scores, kind="stable")
    kept = order[: sampling.top_k or len(order)]
    weights = np.exp(scores[kept] - scores[kept[0]])
    before = (np.cumsum(weights) - weights) / weights.sum()
    if sampling.top_p < 1:
        kept = kept[(before < sampling.top_p) | (np.arange(len(kept)) == 0)]
    return int(kept[np.argmax((scores + gumbel(sampling.seed, position, len(scores)))[kept])])


def some_settings(choose: random.Random) -> Sampling:
    return Sampling(
        temperature=choose.choice([0.0, 0.3, 1.0, 1.5]),
        top_p=choose.choice([1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.9999]),
        top_k=choose.choice([0, 0, 1, 5, 20, WIDTH - 1, WIDTH, 5000]),
        min_p=choose.choice([0.0, 0.0, 1e-6, 0.05, 1.0]),
        seed=choose.randrange(-(2**63), 2**63),
    )


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch does on a GPU it can do on a CPU too, more slowly."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(cuts, "_numpys", lambda _: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [4, 50, WIDTH, WIDTH + 1, LARGE])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("coarse", [False, True], ids=["fine", "with many equals"])
def test_a_batch_of_all_kinds_draws_what_each_draws_alone_and_plainly(size: int, spread: float, coarse: bool) -> None:
    choose = random.Random(size)
    logits = spread * torch.randn(18, size, generator=torch.Generator().manual_seed(size))
    logits = logits.bfloat16().float() if coarse else logits
    asks = [Ask(some_settings(choose), range(choose.randrange(1, 99))) for _ in logits]
    together = draw(logits, asks)
    assert together == [draw(row[None], [ask])[0] for row, ask in zip(logits, asks, strict=True)]
    expected = [plainly(row, ask.sampling, ask.position) for row, ask in zip(logits, asks, strict=True)]
    assert [each.token for each in together] == expected


def test_top_p_is_of_what_top_k_leaves_even_beyond_the_width() -> None:
    """What stands behind top_k weighs more than all before it."""
    logits = torch.full((LARGE,), -2.0)
    logits[:600] = 0.0
    sampling = Sampling(temperature=1.0, top_p=0.2, top_k=WIDTH, seed=5)
    assert tokens(logits, sampling, range(40)) == [plainly(logits, sampling, position) for position in range(40)]
    assert max(filter(None, tokens(logits, sampling, range(400)))) == 131  # 0.2 of (600 + 424 / e²)


# -- what it costs --


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows that were put in order, and how many of their tokens."""
    found, real = [], cuts._likeliest

    def likeliest(scores: torch.Tensor, width: int) -> torch.Tensor:
        found.append((len(scores), width))
        return real(scores, width)

    monkeypatch.setattr(cuts, "_likeliest", likeliest)
    return found


def test_only_rows_whose_cuts_leave_much_are_put_in_order_as_a_whole(widths: list[tuple[int, int]]) -> None:
    rows = torch.randn(3, LARGE, generator=torch.Generator().manual_seed(1)) * torch.tensor([[8.0], [0.1], [8.0]])
    draw(rows, [Ask(Sampling(temperature=1.0, top_p=0.95), [1])] * 3)
    assert widths == [(3, WIDTH), (1, LARGE)]


def test_top_k_takes_no_more_than_it_needs(widths: list[tuple[int, int]]) -> None:
    rows = torch.zeros(2, LARGE)
    draw(rows, [Ask(Sampling(temperature=1.0, top_p=0.5, top_k=k), [1]) for k in (5, 20)])
    assert widths == [(2, 21)]


@pytest.mark.parametrize("settings", [{}, {"min_p": 0.1}, {"temperature": 0.0, "top_p": 0.5}])
def test_what_needs_no_order_makes_none(settings: dict[str, float], widths: list[tuple[int, int]]) -> None:
    draw(torch.zeros(2, LARGE), [Ask(structs.replace(Sampling(temperature=1.0), **settings), [1])] * 2)
    assert widths == []


def test_noise_is_made_for_what_the_cuts_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    noised: list[int] = []

    def noise(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        noised.extend(ids.flatten().tolist())
        return gumbel_of(seeds, positions, ids)

    monkeypatch.setattr(cuts, "gumbel_of", noise)
    logits = torch.zeros(2, LARGE)
    logits[0, [7, 70]], logits[1, [9, 900, 9000]] = 50.0, 40.0
    draw(logits, [Ask(Sampling(temperature=1.0, top_p=0.9), [1]), Ask(Sampling(temperature=1.0, top_p=0.99), [1])])
    assert noised == [7, 70, 9, 900, 9000]


# -- noise --


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


@pytest.mark.parametrize("size", [1, 4, 1003])
def test_noise_is_the_same_for_all_ids_for_some_and_by_numpy(size: int) -> None:
    seeds, positions = [0, -3, 2**64 - 1, 2**63], [0, 17, 1, 2**40]
    expected: npt.NDArray[np.float64] = np.stack([gumbel(*each, size) for each in zip(seeds, positions, strict=True)])
    words, places = torch.tensor([[signed(seed)] for seed in seeds]), torch.tensor([[at] for at in positions])
    assert gumbel_rows(words, places, size).numpy() == pytest.approx(expected, rel=1e-12)
    ids = torch.randint(0, size, (4, 9), generator=torch.Generator().manual_seed(1))
    some = np.take_along_axis(expected, ids.numpy(), 1)
    assert gumbel_of(words, places, ids).numpy() == pytest.approx(some, rel=1e-12)


# -- what is no number --


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.5}])
def test_numbers_that_are_none_are_refused_and_spoil_no_neighbour(bad: float, settings: dict[str, float]) -> None:
    ask = Ask(Sampling(**settings, seed=4, logprobs=1), range(12))  # type: ignore[arg-type]
    good = torch.tensor([3.0, 0.5, 1.0, 2.0])
    found = draw(torch.stack([good, torch.tensor([0.0, bad, 1.0, 2.0]), good]), [ask] * 3)
    assert found[1] == Drawn(failed="1 of 4 logits at position 12 are not finite")
    assert [found[0], found[2]] == draw(good[None], [ask]) * 2


def test_nobody_asks() -> None:
    assert draw(torch.zeros(0, 7), []) == []
