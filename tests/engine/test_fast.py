"""The fast tower against transformers' own, in float32 on the CPU: same order, same windows, same sums."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from epdctl.engine.fast import Features, Unsupported, fast_tower
from epdctl.engine.fast.layout import Geometry, Grid, lay_out
from epdctl.engine.fast.pixels import EightBit
from epdctl.engine.fast.plain import PlainOps
from tests.support.reference import picture_bytes

GRIDS: list[Grid] = [(1, 8, 8), (1, 6, 10), (1, 2, 14), (1, 12, 18), (1, 34, 10)]


@pytest.fixture(scope="module")
def windowed() -> Any:
    """An MLP of 37: padded by the fast one."""
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        hidden_size=32, intermediate_size=37, depth=3, num_heads=2, out_hidden_size=48, fullatt_block_indexes=[1]
    )
    return _spread(Qwen2_5_VisionTransformerPretrainedModel(config))


@pytest.fixture(scope="module")
def deep() -> Any:
    torch.manual_seed(1)
    config = Qwen3VLVisionConfig(
        hidden_size=32, intermediate_size=44, depth=4, num_heads=2, out_hidden_size=48, patch_size=16,
        num_position_embeddings=36, deepstack_visual_indexes=[0, 2],
    )  # fmt: skip
    return _spread(Qwen3VLVisionModel(config))


def _spread(module: Any) -> Any:
    """Weights of a size that lets every part of the sum show."""
    for name, parameter in module.named_parameters():
        spread = 0.3 if "norm" in name or "bias" in name else 1.5 * parameter[0].numel() ** -0.5
        parameter.data.normal_(1.0 if "norm" in name and "weight" in name else 0.0, spread)
    return module.eval().requires_grad_(False)


def noise(module: Any, grids: list[Grid]) -> list[torch.Tensor]:
    width = module.patch_embed.proj.weight[0].numel()
    return [torch.randn(time * height * across, width) for time, height, across in grids]


def check(module: Any, grids: list[Grid]) -> Features:
    pixels = noise(module, grids)
    found = fast_tower(module, ops=PlainOps()).encode(pixels, grids)
    with torch.no_grad():
        due = module(torch.cat(pixels), torch.tensor(grids))
    torch.testing.assert_close(found.pooled, due.pooler_output, atol=1e-4, rtol=1e-4)
    assert float(due.pooler_output.std()) > 0.1
    for one, other in zip(found.deep, getattr(due, "deepstack_features", ()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    return found


def test_windows_and_padded_widths(windowed: Any) -> None:
    check(windowed, GRIDS)
    check(windowed, [(2, 10, 6), (1, 8, 8)])


def test_learned_positions_and_deepstack(deep: Any) -> None:
    assert len(check(deep, GRIDS).deep) == 2


def test_the_library_keeps_its_weights(windowed: Any) -> None:
    before = {name: value.clone() for name, value in windowed.state_dict().items()}
    check(windowed, [(1, 8, 8)])
    mlp = windowed.blocks[0].mlp
    assert mlp.gate_proj.weight.shape == (37, 32)
    storages = {part.weight.untyped_storage().data_ptr() for part in (mlp.gate_proj, mlp.up_proj)}
    assert len(storages) == 1  # one copy, which the fast tower owns
    assert all(torch.equal(value, before[name]) for name, value in windowed.state_dict().items())


def test_layouts_are_the_librarys() -> None:
    order, borders = get_vision_window_index(torch.tensor(GRIDS), 2, 112, 14)
    places = get_vision_position_ids(torch.tensor(GRIDS), 2).reshape(-1, 4, 2)[order].reshape(-1, 2)
    layout = lay_out(GRIDS, Geometry(merge=2, window=4))
    assert layout.order is not None
    assert layout.order.tolist() == order.tolist()
    assert layout.windows.cumsum().tolist() == borders[1:].tolist()
    assert list(zip(layout.rows, layout.columns, strict=True)) == [tuple(place) for place in places.tolist()]


def test_eight_bit_pictures_are_what_the_processor_makes_of_them(windowed: Any) -> None:
    """Bit for bit: the table holds the processor's own numbers."""
    table = torch.randn(3, 256)
    grids: list[Grid] = [(1, 4, 6), (1, 2, 2), (1, 10, 12)]
    pictures = [torch.randint(0, 256, (14 * grid[1], 14 * grid[2], 3), dtype=torch.uint8) for grid in grids]
    tower = fast_tower(windowed, table, ops=PlainOps())
    due = tower.encode([patches(picture, table) for picture in pictures], grids)
    assert torch.equal(tower.encode(pictures, grids).pooled, due.pooled)


def patches(picture: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[patches, 3 · 2 · 14 · 14], as processors order them: two by two, a still picture's frame twice."""
    values = torch.stack([table[channel][picture[..., channel].int()] for channel in range(3)])
    height, width = picture.shape[0] // 28, picture.shape[1] // 28
    tiles = values.view(3, height, 2, 14, width, 2, 14).permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 1, 196)
    return tiles.expand(-1, 3, 2, 196).flatten(1)


def test_what_is_not_understood_is_said(windowed: Any) -> None:
    with pytest.raises(Unsupported, match=r"no kernels for torch\.float32 on cpu"):
        fast_tower(windowed)
    with pytest.raises(Unsupported, match="Linear has no patch_embed"):
        fast_tower(torch.nn.Linear(2, 2), ops=PlainOps())


def test_warming_up_says_how_far_it_is(windowed: Any) -> None:
    said: list[tuple[int, int]] = []
    fast_tower(windowed, torch.zeros(3, 256), ops=PlainOps()).warm_up(lambda done, total: said.append((done, total)))
    assert said == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("size", [(140, 140), (300, 90), (61, 200), (28, 28)])
def test_pixels_and_table_are_the_processors_numbers(size: tuple[int, int], checkpoint: Path, windowed: Any) -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    picture = Image.open(io.BytesIO(picture_bytes(3, *size))).convert("RGB")
    due = processor(images=[picture], return_tensors="pt")
    (grid,) = [(time, height, width) for time, height, width in due["image_grid_thw"].tolist()]
    eight_bit = EightBit(processor, 14, pinned=False)
    pixels = eight_bit.take(picture, grid)
    assert torch.equal(patches(pixels, eight_bit.table), due["pixel_values"])
    with pytest.raises(ValueError, match="for a grid of"):
        EightBit(_never_resizing(processor), 14, pinned=False).take(picture, (1, 4, 4))


def _never_resizing(processor: Any) -> Any:
    other = copy.copy(processor)
    other.do_resize = False
    return other
