"""The torch-free half of LLaVA-OneVision, held against transformers' own processor: lone pictures and several."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from epdctl.encoder.cache import EmbeddingKey, key_of
from epdctl.errors import LoadError
from epdctl.families import open_family
from epdctl.families.base import Family, PictureHeader, Span
from epdctl.families.llava_onevision import LONGEST
from epdctl.wire.encode import MediaItem

IMAGE = 77
PUBLISHED = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SMALL = [[56, 112], [112, 56], [112, 112], [168, 224], [224, 224]]

# (side, patch, pinpoints, tiles that a picture may be worth)
MODELS: dict[str, tuple[int, int, list[list[int]], int]] = {
    "published": (384, 14, PUBLISHED, 9),
    "few pinpoints": (384, 14, [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]], 9),
    "largest first": (384, 14, PUBLISHED[::-1], 9),
    "small": (56, 14, SMALL, 9),
    "kept small": (336, 14, [[336 * rows, 336 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)], 4),
}


def checkpoint(directory: Path, side: int, patch: int, pinpoints: list[list[int]], most: int, **config: Any) -> Path:
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "model_type": "llava_onevision",
            "image_token_index": IMAGE,
            "eos_token_id": 5,
            "vision_config": {"image_size": side, "patch_size": patch},
            "vision_aspect_ratio": f"anyres_max_{most}",
            **config,
        },
        "preprocessor_config.json": {"image_grid_pinpoints": pinpoints, "size": {"height": side, "width": side}},
        "processor_config.json": {"num_image_tokens": (side // patch) ** 2},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def processor(directory: Path, side: int, patch: int, most: int) -> Any:
    """The library's own methods, on as much of a processor as they look at."""
    whole = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    whole.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)
    whole.num_image_tokens = (side // patch) ** 2
    whole.vision_feature_select_strategy = "full"
    whole.vision_aspect_ratio = f"anyres_max_{most}"
    whole.image_token = "*"
    return whole


def sizes(seed: int, count: int) -> list[tuple[int, int]]:
    """Of all shapes, and every fourth an exact multiple, where one pinpoint is as good as another."""
    draw = random.Random(seed)
    found = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(count // 2)]
    found += [(draw.randint(1, 400), draw.randint(1, 400)) for _ in range(count // 4)]
    found += [(28 * draw.randint(1, 90), 28 * draw.randint(1, 90)) for _ in range(count - len(found) - 8)]
    return [*found, (1, 1), (1, 3000), (3000, 1), (2, 8000), (384, 384), (768, 768), (2304, 2304), (56, 224)]


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_processor_for_every_size_and_count(name: str, tmp_path: Path) -> None:
    side, patch, pinpoints, most = MODELS[name]
    family = open_family(checkpoint(tmp_path, side, patch, pinpoints, most))
    own = processor(tmp_path, side, patch, most)
    draw = random.Random(7)
    measured = sizes(31, 520)
    tile = np.zeros((1, 1, 3, side, side), np.uint8)
    for width, height in measured:
        for count in (1, draw.randint(2, 16)):
            seen = {"batch_num_images": [count], "image_sizes": [[height, width]] * count, "pixel_values": tile}
            rows = len(own.replace_image_token(seen, draw.randrange(count)))
            assert family.span(PictureHeader(width, height), count).rows == rows, (width, height, count)
    assert len(measured) >= 500


@pytest.mark.parametrize("name", MODELS)
def test_the_embedding_of_a_lone_picture_is_never_taken_for_that_of_one_of_several(name: str, tmp_path: Path) -> None:
    family = open_family(checkpoint(tmp_path, *MODELS[name]))
    for width, height in sizes(5, 100):
        lone, pair, many = (_key(family.span(PictureHeader(width, height), of), of) for of in (1, 2, 7))
        assert lone != pair == many, (width, height)


def _key(span: Span, of: int) -> EmbeddingKey | None:
    grid = list(span.grid)
    return key_of(MediaItem(index=0, modality=span.modality, content_hash="ab", of=of, grid=grid, rows=span.rows))


@pytest.mark.parametrize("name", ["few pinpoints", "small"])
def test_tiles_are_those_of_real_pictures(name: str, tmp_path: Path) -> None:
    side, patch, pinpoints, most = MODELS[name]
    family = open_family(checkpoint(tmp_path, side, patch, pinpoints, most))
    own = processor(tmp_path, side, patch, most).image_processor
    for width, height in sizes(5, 20)[:8]:
        picture = np.zeros((height, width, 3), np.uint8)
        for count in (1, 3):
            values = own(images=[[picture] * count])
            tiles, *size = family.span(PictureHeader(width, height), count).grid
            assert tiles == len(values["pixel_values"][0])
            assert size == [*values["image_sizes"][0]]


def published(tmp_path: Path, **config: Any) -> Family:
    return open_family(checkpoint(tmp_path, *MODELS["published"], **config))


def test_a_picture_among_others_is_not_tiled(tmp_path: Path) -> None:
    family = published(tmp_path)
    assert family.span(PictureHeader(1000, 700), 2) == Span((1, 700, 1000), 27 * 27 + 1)
    alone = family.span(PictureHeader(1000, 700), 1)
    assert alone.grid == (7, 700, 1000)
    assert alone.rows > 5 * 27 * 27


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (LONGEST + 1, 4), (4, LONGEST + 1)])
@pytest.mark.parametrize("of", [1, 2])
def test_a_picture_that_no_square_can_hold_is_refused(size: tuple[int, int], of: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture of"):
        published(tmp_path).span(PictureHeader(*size), of)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy 'default'"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio 'square'"),
        ({"image_token_index": None}, "image_token_id is None"),
    ],
)
def test_a_choice_that_is_not_served_is_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=said):
        published(tmp_path, **config)


def test_what_a_checkpoint_does_not_say_is_as_in_the_library(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, 1, [], 1)
    config = {"model_type": "llava_onevision", "image_token_id": IMAGE, "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "spoken").mkdir()
    said = published(tmp_path / "spoken").span(PictureHeader(900, 500), 1)
    assert open_family(tmp_path).span(PictureHeader(900, 500), 1) == said


def test_settings_kept_with_those_of_all_processors_go_first(tmp_path: Path) -> None:
    checkpoint(tmp_path, *MODELS["published"])
    nested = {"image_processor": {"image_grid_pinpoints": [[384, 384]]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert open_family(tmp_path).span(PictureHeader(900, 500), 1).grid[0] == 2
