"""The torch-free halves of Qwen2.5-VL and Qwen3-VL, held against transformers' own image processor."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from epdctl.errors import LoadError
from epdctl.families import SERVED, open_family
from epdctl.families.base import PictureHeader, Span
from epdctl.families.qwen2_5_vl import Qwen25VL

IMAGE = 77
DEFAULT_SIZE = dict(Qwen2VLImageProcessorPil.size)


@pytest.fixture(autouse=True)
def _own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 writes a checkpoint's sizes into the class, and so into every later processor's defaults."""
    monkeypatch.setattr(Qwen2VLImageProcessorPil, "size", dict(DEFAULT_SIZE))


CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "old form": {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2},
    "new form": {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 300 * 28 * 28}},
    "both forms": {"size": {"shortest_edge": 1, "longest_edge": 10**9}, "min_pixels": 50176, "max_pixels": 200704},
    "other patches": {"patch_size": 16, "merge_size": 2, "min_pixels": 65536, "max_pixels": 262144},
    "qwen3_vl": {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 65536, "longest_edge": 16777216}},
}


def checkpoint(directory: Path, processor: dict[str, Any], **generation: Any) -> Path:
    family = "qwen3_vl" if processor is CONFIGS["qwen3_vl"] else "qwen2_5_vl"
    config = {"model_type": family, "image_token_id": IMAGE, "eos_token_id": 5}
    (directory / "config.json").write_text(json.dumps(config))
    written = {"image_processor_type": "Qwen2VLImageProcessor", **processor}
    (directory / "preprocessor_config.json").write_text(json.dumps(written))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def sizes(count: int, longest: int) -> list[tuple[int, int]]:
    """Seeded; half of them near multiples of 28, where rounding decides."""
    draw = random.Random(20)
    found = [(draw.randint(1, longest), draw.randint(1, longest)) for _ in range(count // 2)]
    found += [(28 * draw.randint(1, longest // 28) + draw.choice([-14, -1, 0, 1, 14]), 28) for _ in range(count // 8)]
    while len(found) < count:
        found.append(tuple(max(1, 28 * draw.randint(1, longest // 28) + draw.choice([-14, 0, 14])) for _ in "wh"))  # type: ignore[arg-type]
    return [size for size in found if max(size) / min(size) <= 200]


@pytest.mark.parametrize("name", CONFIGS)
def test_patches_are_those_of_the_processor(name: str, tmp_path: Path) -> None:
    family = open_family(checkpoint(tmp_path, CONFIGS[name]))
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    measured = sizes(520, 4000)
    assert len(measured) >= 500
    for width, height in measured:
        picture = family.span(PictureHeader(width, height), 1)
        assert all(family.span(PictureHeader(width, height), of) == picture for of in (2, 16))
        patches = processor.get_number_of_image_patches(height, width)
        assert picture.grid[1] * picture.grid[2] == patches, (width, height)
        assert picture.rows == patches // processor.merge_size**2


@pytest.mark.parametrize("name", ["new form", "qwen3_vl"])
def test_grids_are_those_of_real_pictures(name: str, tmp_path: Path) -> None:
    family = open_family(checkpoint(tmp_path, CONFIGS[name]))
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for width, height in sizes(60, 500):
        values = processor(images=[Image.fromarray(np.zeros((height, width, 3), np.uint8))])
        assert list(family.span(PictureHeader(width, height), 1).grid) == list(values["image_grid_thw"][0])


@pytest.mark.parametrize("size", [(201, 1), (1, 4000), (0, 10)])
def test_shapes_that_the_processor_refuses_are_refused(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture of"):
        open_family(checkpoint(tmp_path, {})).span(PictureHeader(*size), 1)


def test_placeholders_are_repeated_and_items_know_their_place(tmp_path: Path) -> None:
    family = open_family(checkpoint(tmp_path, {}))
    prompt = family.expand([1, IMAGE, 2, IMAGE], [Span((1, 4, 4), 4), Span((1, 2, 4), 2)])
    assert prompt.tokens == [1, *[IMAGE] * 4, 2, *[IMAGE] * 2]
    assert [(item.index, item.offset, item.rows, item.grid) for item in prompt.items] == [
        (0, 1, 4, [1, 4, 4]),
        (1, 6, 2, [1, 2, 4]),
    ]


@pytest.mark.parametrize("tokens", [[1, 2], [IMAGE, IMAGE]])
def test_a_count_that_does_not_fit_is_refused(tokens: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 pictures"):
        open_family(checkpoint(tmp_path, {})).expand(tokens, [Span((1, 2, 2), 1)])


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert list(open_family(checkpoint(tmp_path, {})).end_token_ids) == [5]
    assert list(open_family(checkpoint(tmp_path, {}, eos_token_id=[8, 9])).end_token_ids) == [8, 9]
    assert list(open_family(checkpoint(tmp_path, {}, do_sample=True)).end_token_ids) == [5]


def test_no_end_token_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "image_token_id": IMAGE}))
    with pytest.raises(LoadError, match="eos_token_id"):
        Qwen25VL(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "missing"),
        ("{", "cannot be read"),
        ("[]", "not a json object"),
        ('{"model_type": "llama"}', "'llama'"),
        ("{}", "None"),
        ('{"model_type": "qwen2_5_vl"}', "preprocessor_config.json is missing"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_why(config: str | None, said: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(LoadError, match=said):
        open_family(tmp_path)


def test_a_family_without_its_image_token_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(LoadError, match="image_token_id"):
        open_family(tmp_path)


def test_families_import_neither_torch_nor_transformers() -> None:
    modules = ", ".join(f"epdctl.families.{name}" for name in SERVED)
    code = f"import sys, epdctl.families, {modules}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
