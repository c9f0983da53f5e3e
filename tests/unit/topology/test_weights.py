"""Sizes from headers alone: files here have no tensors behind them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import epdctl
from epdctl.families import open_family
from epdctl.families.base import PictureHeader
from epdctl.topology.largest import Bounds, Largest, largest
from epdctl.topology.weights import Weights, read_weights

SHAPES_VL = Path(epdctl.__file__).parent / "data" / "shapes-vl"
LANGUAGE = {
    "model.embed_tokens.weight": [100, 8],
    "model.layers.0.self_attn.q_proj.weight": [8, 8],
    "model.layers.0.self_attn.k_proj.weight": [4, 8],
    "model.layers.0.self_attn.v_proj.weight": [4, 8],
    "lm_head.weight": [100, 8],
}
TOWER = {"visual.blocks.0.attn.qkv.weight": [24, 8], "visual.merger.mlp.0.bias": [8]}
CLIP = {"vision_tower.vision_model.layers.0.self_attn.k_proj.weight": [16, 16], "image_newline": [8]}


def write(file: Path, shapes: dict[str, list[int]]) -> None:
    tensors = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)


def test_both_halves_of_one_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", LANGUAGE | TOWER)
    assert read_weights(tmp_path) == Weights(tower=200, language=1728, kv=8, row=8)


def test_the_attention_of_a_tower_has_no_cache(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", LANGUAGE | CLIP)
    assert read_weights(tmp_path) == Weights(tower=264, language=1728, kv=8, row=8)


def test_the_files_of_an_index_and_no_others(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", LANGUAGE)
    write(tmp_path / "two.safetensors", TOWER)
    write(tmp_path / "consolidated.safetensors", LANGUAGE | TOWER | CLIP)
    named = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    assert read_weights(tmp_path) == Weights(tower=200, language=1728, kv=8, row=8)


def test_deepstack_makes_a_row_wider(tmp_path: Path) -> None:
    deep = {f"model.visual.deepstack_merger_list.{place}.norm.{part}": [2] for place in range(3) for part in "wb"}
    write(tmp_path / "model.safetensors", LANGUAGE | TOWER | deep)
    assert read_weights(tmp_path) == Weights(tower=212, language=1728, kv=8, row=32)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 40),
        struct.pack("<Q", 100) + b"{",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 12) + b'{"a": {"b":1',
    ],
)
def test_what_cannot_be_read_is_not_known(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    assert read_weights(tmp_path) is None


def test_a_language_model_without_the_parts_of_one_is_not_known(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", TOWER)
    assert read_weights(tmp_path) is None
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert read_weights(tmp_path) is None


# -- the largest picture --

SHIPPED = largest(SHAPES_VL, Bounds(1 << 24, 600))


def test_the_model_that_is_shipped() -> None:
    assert Largest("a picture of 4575 x 3660 pixels", 20) == SHIPPED
    found = read_weights(SHAPES_VL)
    assert found is not None
    assert (found.kv, found.row) == (4 * 2 * 2 * 32, 128)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4096), st.floats(1 / 6, 6))
def test_no_picture_of_an_ordinary_shape_becomes_more(width: int, aspect: float) -> None:
    assert SHIPPED is not None
    family = open_family(SHAPES_VL)
    try:
        rows = family.span(PictureHeader(width, int(width * aspect)), 1).rows
    except ValueError:
        return
    assert rows <= SHIPPED.rows


def test_a_directory_that_says_nothing(tmp_path: Path) -> None:
    assert largest(tmp_path, Bounds(1 << 20, 1)) is None
