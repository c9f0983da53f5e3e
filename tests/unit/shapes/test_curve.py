"""The learning curve shows what the log says."""

from __future__ import annotations

import numpy as np

from epdctl.bench.shapes.curve import draw_curve


def log(right: float, **more: float) -> list[dict[str, float | str]]:
    return [{"step": step, "seconds": 60 * step, "stage": "all", "colour 1": right, **more} for step in range(1, 40)]


def test_better_answers_lie_higher() -> None:
    def height(right: float) -> float:
        pixels = np.asarray(draw_curve(log(right))).astype(int)
        coloured = pixels[:, 60:780].max(-1) - pixels[:, 60:780].min(-1) > 60
        return float(np.nonzero(coloured)[0].mean())

    assert height(0.9) < height(0.5) < height(0.1)


def test_losses_and_rates_are_no_shares() -> None:
    with_more = draw_curve(log(0.5, rate=0.001, **{"colour 1 loss": 3.0}))
    assert np.array_equal(np.asarray(with_more), np.asarray(draw_curve(log(0.5))))


def test_every_kind_of_question_has_a_line_of_its_own() -> None:
    one, two = log(0.5), log(0.5, **{"colours 8": 0.2})
    assert not np.array_equal(np.asarray(draw_curve(one)), np.asarray(draw_curve(two)))
