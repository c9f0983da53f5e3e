"""A tower alone on one device: transformers' forward and the fast one, their times and their distance from float32."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from epdctl.bench.clusters import Say
from epdctl.bench.encoding.towers import qwen2_5_vl_tower, qwen3_vl_tower
from epdctl.engine.fast import FastTower, Features, fast_tower
from epdctl.engine.fast.layout import Grid
from epdctl.engine.fast.ops import kernels_for
from epdctl.engine.fast.plain import PlainOps

__all__ = ["Comparison", "Packed", "compare", "packed"]


class Comparison(msgspec.Struct, frozen=True):
    """``errors``: ‖out − float32‖ / ‖float32‖ over everything the tower gives."""

    tower: str
    pictures: int
    side: int
    patches: int
    transformers_ms: float
    fast_ms: float
    transformers_error: float
    fast_error: float


class Packed(msgspec.Struct, frozen=True):
    """One forward over 8-bit pictures that lie on the CPU, pinned."""

    pictures: int
    side: int
    ms: float

    @property
    def rate(self) -> float:
        return self.pictures / self.ms * 1000


_TOWERS = {"Qwen2.5-VL": (qwen2_5_vl_tower, 14), "Qwen3-VL": (qwen3_vl_tower, 16)}


def compare(name: str, size: str, device: torch.device, pictures: tuple[int, int], say: Say) -> Comparison:
    """``pictures``: how many, and their side in pixels. On a CPU the fast tower takes plain steps, in float32."""
    comparison = _compared(name, size, device, pictures)
    _free(device)
    before, after = comparison.transformers_ms, comparison.fast_ms
    say(f"{name}, {comparison.pictures} of {comparison.side}²: {before} → {after} ms")
    return comparison


def _compared(name: str, size: str, device: torch.device, pictures: tuple[int, int]) -> Comparison:
    make, patch = _TOWERS[name]
    count, side = pictures
    dtype = _dtype(device)
    tower = make(size, device, dtype)
    grids: list[Grid] = [(1, side // patch, side // patch)] * count
    torch.manual_seed(1)
    patches = grids[0][1] * grids[0][2]
    pixels = torch.randn(count * patches, tower.patch_embed.proj.weight[0].numel(), device=device).to(dtype)
    parts = list(torch.split(pixels, patches))
    library_ms = _timed(lambda: _theirs(tower, pixels, grids), device, repeats=3)
    theirs = _theirs(tower, pixels, grids)
    with _whole_float32():
        exact = _theirs(copy.deepcopy(tower).float(), pixels.float(), grids)
    # last, for it lends the tower weights of padded widths
    fast = fast_tower(tower, ops=kernels_for(device, dtype) or PlainOps(), wide=dtype.itemsize == 2)
    fast_ms = _timed(lambda: fast.encode(parts, grids), device, repeats=9)
    found = fast.encode(parts, grids)
    return Comparison(
        tower=name,
        pictures=count,
        side=side,
        patches=count * patches,
        transformers_ms=round(library_ms, 2),
        fast_ms=round(fast_ms, 2),
        transformers_error=round(_distance(theirs, exact), 6),
        fast_error=round(_distance(found, exact), 6),
    )


def packed(size: str, device: torch.device, pictures: Sequence[tuple[int, int]], say: Say) -> list[Packed]:
    """Qwen2.5-VL's tower over each (count, side)."""
    dtype = _dtype(device)
    tower = qwen2_5_vl_tower(size, device, dtype)
    ops = kernels_for(device, dtype) or PlainOps()
    fast = fast_tower(tower, torch.randn(3, 256), ops=ops, wide=dtype.itemsize == 2)
    measured = [_packed(fast, count, side) for count, side in pictures]
    for each in measured:
        say(f"one forward of {each.pictures} × {each.side}²: {each.ms} ms, {each.rate:.0f} pictures/s")
    return measured


def _packed(fast: FastTower, count: int, side: int) -> Packed:
    raw = [torch.randint(0, 256, (side, side, 3), dtype=torch.uint8) for _ in range(count)]
    if fast.device.type == "cuda":
        raw = [each.pin_memory() for each in raw]
    grids: list[Grid] = [(1, side // 14, side // 14)] * count
    ms = _timed(lambda: fast.encode(raw, grids), fast.device, repeats=5)
    return Packed(pictures=count, side=side, ms=round(ms, 2))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.inference_mode()
def _theirs(tower: Any, pixels: torch.Tensor, grids: Sequence[Grid]) -> Features:
    found = tower(pixels, torch.tensor(grids, device=pixels.device))
    return Features(found.pooler_output, tuple(getattr(found, "deepstack_features", None) or ()))


def _distance(found: Features, exact: Features) -> float:
    one, other = (torch.cat([each.pooled.float(), *(deep.float() for deep in each.deep)], 1) for each in (found, exact))
    return float((one - other).norm() / other.norm())


@contextmanager
def _whole_float32() -> Generator[None]:
    """Without the matrix units' shorter float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds, each from launch to the end of the device's work, after two that do not count."""
    times = []
    for number in range(repeats + 2):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
