"""The kernels against the plain steps, on a GPU: odd sizes, runs that end anywhere, every width of a head."""

from __future__ import annotations

import pytest
import torch

from epdctl.engine.fast.ops import Angles, Places, Runs, Values, kernels_for
from epdctl.engine.fast.parts import Norm
from epdctl.engine.fast.plain import PlainOps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = torch.device("cuda", 0)
PLAIN = PlainOps()
HALF = 0.004  # relative; a step that rounds once to 16 bits stays below
KINDS = [torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=GPU).to(dtype)


def near(found: torch.Tensor, due: torch.Tensor, bound: float = HALF) -> None:
    assert float((found.float() - due.float()).norm() / due.float().norm()) < bound


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("width", [32, 1152, 1280, 4608])
@pytest.mark.parametrize("centred", [True, False])
def test_norms(dtype: torch.dtype, width: int, centred: bool) -> None:
    kernels = kernels_for(GPU, dtype)
    assert kernels is not None
    x, delta = draw(37, width, dtype=dtype), draw(37, width, dtype=dtype)
    norm = Norm(draw(width, dtype=dtype), draw(width, dtype=dtype) if centred else None, 1e-6, centred)
    near(kernels.norm(x, norm), PLAIN.norm(x.float(), norm))
    one, other = x.clone(), x.clone()
    due = PLAIN.add_norm(other, delta, norm)
    near(kernels.add_norm(one, delta.clone(), norm), due)
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("width", [16, 72, 80, 96, 128])
def test_attention_within_runs(dtype: torch.dtype, width: int) -> None:
    kernels = kernels_for(GPU, dtype)
    assert kernels is not None
    ends = [0, 64, 65, 129, 400, 1001]
    runs = Runs(torch.tensor(ends, dtype=torch.int32, device=GPU), 5, 601)
    turns = draw(ends[-1], width // 2)
    angles = Angles(turns.cos(), turns.sin())
    qkv = draw(ends[-1], 3, 4, width, dtype=dtype)
    turned = qkv.float()
    PLAIN.rotate(turned, angles)
    kernels.rotate(qkv, angles)
    near(qkv, turned)
    near(kernels.attend(qkv, runs, width**-0.5), PLAIN.attend(qkv.float(), runs, width**-0.5))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("width", [16, 72, 80, 128])
def test_windows_are_turned_and_attended_at_once(dtype: torch.dtype, width: int) -> None:
    kernels = kernels_for(GPU, dtype)
    assert kernels is not None
    ends = [0, 64, 65, 100, 164, 180]
    runs = Runs(torch.tensor(ends, dtype=torch.int32, device=GPU), 5, 64)
    turns = draw(ends[-1], width // 2)
    angles = Angles(turns.cos(), turns.sin())
    qkv = draw(ends[-1], 3, 4, width, dtype=dtype)
    near(kernels.windows(qkv, angles, runs, width**-0.5), PLAIN.windows(qkv.float(), angles, runs, width**-0.5))


@pytest.mark.parametrize("dtype", KINDS)
def test_gates_and_pixels(dtype: torch.dtype) -> None:
    kernels = kernels_for(GPU, dtype)
    assert kernels is not None
    x = draw(19, 2 * 3424, dtype=dtype)
    near(kernels.gate(x), PLAIN.gate(x.float()))
    pixels = torch.randint(0, 256, (28 * 28 * 3 + 28 * 56 * 3,), dtype=torch.uint8, device=GPU)
    starts = torch.tensor([0, 42, 14 * 84, 28 * 84 + 42], device=GPU)
    places = Places(starts, torch.tensor([84, 84, 84, 168], device=GPU))
    values = Values(draw(3, 256), 14, 2, dtype)
    assert torch.equal(kernels.cut(pixels, places, values), PLAIN.cut(pixels, places, values))
