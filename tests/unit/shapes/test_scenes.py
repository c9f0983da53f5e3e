"""Scenes at random keep what they promise: inside the picture, apart from each other, at the named side."""

from __future__ import annotations

import itertools
import math

import pytest

from epdctl.bench.shapes.draw import Colour, Place, Scene, Shape
from epdctl.bench.shapes.scenes import COUNTS, TRAINED, UNSEEN, Composer, World

WORLDS = pytest.mark.parametrize("world", [TRAINED, UNSEEN], ids=["trained", "unseen"])
MANY = 60


def inside(scene: Scene) -> bool:
    return all(
        figure.radius <= figure.x <= scene.width - figure.radius
        and figure.radius <= figure.y <= scene.height - figure.radius
        for figure in scene.figures
    )


def test_a_seed_decides_about_everything() -> None:
    one, again, other = (Composer(TRAINED, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    first = [one.several(one.size(), 3) for _ in range(5)]
    assert first == [again.several(again.size(), 3) for _ in range(5)]
    assert first != [other.several(other.size(), 3) for _ in range(5)]


@WORLDS
def test_figures_lie_inside_and_apart(world: World) -> None:
    composer = Composer(world, 5)
    for _, count in itertools.product(range(MANY), COUNTS):
        scene = composer.several(composer.size(), count)
        assert len(scene.figures) == count
        assert inside(scene)
        for one, other in itertools.combinations(scene.figures, 2):
            assert math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


@WORLDS
@pytest.mark.parametrize("place", Place)
def test_a_placed_figure_is_plainly_on_its_side(world: World, place: Place) -> None:
    composer = Composer(world, 6)
    for _ in range(MANY):
        size = composer.size()
        scene = composer.placed(size, place)
        (figure,) = scene.figures
        right, down = figure.x / size[0] - 0.5, figure.y / size[1] - 0.5
        sides = {Place.LEFT: -right, Place.RIGHT: right, Place.TOP: -down, Place.BOTTOM: down}
        assert scene.place is place
        assert max(Place, key=lambda side: sides[side]) is place
        assert sides[place] > 0.2


@WORLDS
def test_a_world_uses_its_own_backgrounds_and_sizes_and_all_of_them(world: World) -> None:
    composer = Composer(world, 7)
    scenes = [composer.one(composer.size()) for _ in range(400)]
    assert {scene.background for scene in scenes} == set(world.backgrounds)
    assert {(scene.width, scene.height) for scene in scenes} == set(world.sizes)
    assert {scene.figures[0].shape for scene in scenes} == set(Shape)
    assert {scene.figures[0].colour for scene in scenes} == set(Colour)
    assert all(map(inside, scenes))


def test_what_is_held_out_was_never_trained_on() -> None:
    assert not set(TRAINED.backgrounds) & set(UNSEEN.backgrounds)
    assert not set(TRAINED.sizes) & set(UNSEEN.sizes)


def test_a_wish_is_kept_and_a_veto_too() -> None:
    composer = Composer(TRAINED, 8)
    for _ in range(MANY):
        (figure,) = composer.one((48, 48), Shape.CROSS, Colour.PINK).figures
        assert (figure.shape, figure.colour) == (Shape.CROSS, Colour.PINK)
        assert composer.shape(but=Shape.CROSS) is not Shape.CROSS
        assert composer.colour(but=Colour.PINK) is not Colour.PINK


def test_a_palette_is_of_one_size_or_of_two_or_three_as_often_as_said() -> None:
    composer = Composer(TRAINED, 9)
    lengths = [len(set(composer.palette(0.7))) for _ in range(400)]
    assert set(lengths) == {1, 2, 3}
    assert 90 <= lengths.count(1) <= 150
    assert {len(composer.palette(0.0)) for _ in range(50)} == {1}
    palette = composer.palette(1.0)
    assert set(composer.sizes(palette, 40)) == set(palette)
