"""What is drawn is what was asked for: the same every time, in the named colour, where and as large as said."""

from __future__ import annotations

import colorsys
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from epdctl.bench.shapes import backgrounds
from epdctl.bench.shapes.draw import HUES, MUTED, Colour, Figure, Scene, Shape, coverage, png, render

MIDDLE = Figure(Shape.CIRCLE, Colour.RED, 32, 24, 14)
SCENE = Scene(64, 48, "clouds", (MIDDLE,), seed=3)


def hsv(pixel: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) / 255 for value in pixel)
    return colorsys.rgb_to_hsv(red, green, blue)


def nearest(pixel: np.ndarray) -> Colour:
    """By RGB, which is how the eye of a small model may see it too."""

    def distance(colour: Colour) -> float:
        hue, saturation, value = HUES[colour]
        wanted = np.array(colorsys.hsv_to_rgb(hue / 360, saturation, value)) * 255
        return float(np.abs(wanted - pixel).sum())

    return min(Colour, key=distance)


def test_equal_scenes_give_equal_files() -> None:
    assert png(SCENE) == png(replace(SCENE))
    assert png(SCENE) != png(replace(SCENE, seed=4))


def test_a_file_holds_the_very_pixels() -> None:
    with Image.open(io.BytesIO(png(SCENE))) as picture:
        assert picture.format == "PNG"
        assert picture.size == (64, 48)
        assert np.array_equal(np.asarray(picture), render(SCENE))


@pytest.mark.parametrize("kind", backgrounds.KINDS)
@pytest.mark.parametrize("colour", Colour)
def test_a_figure_has_its_colour_on_every_background(kind: str, colour: Colour) -> None:
    for seed in range(4):
        scene = Scene(64, 48, kind, (replace(MIDDLE, colour=colour),), seed)
        assert nearest(render(scene)[20:29, 28:37].mean((0, 1))) is colour


@pytest.mark.parametrize("kind", backgrounds.KINDS)
def test_a_background_is_muted_and_fills_the_picture(kind: str) -> None:
    for seed in range(4):
        field = backgrounds.field(kind, np.random.default_rng(seed), 50, 40)
        assert field.shape == (40, 50)
        assert field.min() >= 0
        assert field.max() <= 1
        whole = render(Scene(50, 40, kind, (), seed)).mean((0, 1))
        assert hsv(whole)[1] < MUTED + 0.1


def test_backgrounds_differ_from_seed_to_seed() -> None:
    for kind in set(backgrounds.KINDS) - {"flat"}:
        one, other = (backgrounds.field(kind, np.random.default_rng(seed), 48, 48) for seed in (1, 2))
        assert not np.array_equal(one, other), kind


def test_every_kind_is_either_trained_on_or_held_out() -> None:
    assert len(backgrounds.TRAINED) >= 8
    assert len(backgrounds.UNSEEN) >= 3
    assert sorted([*backgrounds.TRAINED, *backgrounds.UNSEEN]) == sorted(backgrounds.KINDS)


@pytest.mark.parametrize("shape", Shape)
def test_a_shape_covers_its_middle_and_stays_within_its_radius(shape: Shape) -> None:
    (covered,) = coverage(Scene(64, 48, "flat", (replace(MIDDLE, shape=shape, turn=0.2),), seed=0))
    rows, columns = np.nonzero(covered > 0.5)
    assert covered[24, 32] == 1
    assert np.hypot(columns + 0.5 - 32, rows + 0.5 - 24).max() < 1.25 * 14
    assert 0.3 < covered.sum() / 14**2 < 3.2


def test_the_four_shapes_differ_in_area_or_outline() -> None:
    areas = [coverage(Scene(64, 48, "flat", (replace(MIDDLE, shape=shape),), 0))[0] for shape in Shape]
    for index, one in enumerate(areas):
        for other in areas[:index]:
            assert np.abs(one - other).sum() > 0.1 * one.sum()
