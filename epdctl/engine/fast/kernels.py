"""Triton kernels between the matrix products: one pass over memory each, float32 inside.

Sizes that differ from batch to batch are never compile-time constants, so each kernel is compiled once per model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from epdctl.engine.fast.ops import MAX_WINDOW, Angles, Places, Runs, Values
from epdctl.engine.fast.parts import Norm

__all__ = ["KernelOps"]

_LEAST = 16  # of any side of a product
_LOG2_E = 1.4426950408889634  # the kernels' exponentials are of two


class KernelOps:
    """Implements ops.Ops for contiguous tensors on one GPU."""

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        out = torch.empty_like(x, dtype=norm.weight.dtype)
        self._norm(x, None, norm, out)
        return out

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, norm: Norm) -> torch.Tensor:
        self._norm(x, delta, norm, delta)  # the sum is read before it is written, row by row
        return delta

    def _norm(self, x: torch.Tensor, delta: torch.Tensor | None, norm: Norm, out: torch.Tensor) -> None:
        width = norm.weight.shape[0]
        _add_norm[(x.numel() // width,)](
            x, delta if delta is not None else x, norm.weight, norm.bias if norm.bias is not None else norm.weight, out,
            norm.eps, WIDTH=width, BLOCK=triton.next_power_of_2(width), ADD=delta is not None,
            CENTRED=norm.centred, BIASED=norm.bias is not None, num_warps=4 if width <= 2048 else 8,
        )  # fmt: skip

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        rows, width = x.shape[0], x.shape[1] // 2
        out = x.new_empty(rows, width)
        _gate[(rows,)](x, out, WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=8)
        return out

    def rotate(self, qkv: torch.Tensor, angles: Angles) -> None:
        patches, _, heads, width = qkv.shape
        half = width // 2
        _rotate[(patches,)](
            qkv, angles.cos, angles.sin, HEADS=2 * heads, ALL=3 * heads, HALF=half,
            BLOCK_HEADS=triton.next_power_of_2(2 * heads), BLOCK=triton.next_power_of_2(half), num_warps=4,
        )  # fmt: skip

    def windows(self, qkv: torch.Tensor, angles: Angles, runs: Runs, scale: float) -> torch.Tensor:
        patches, _, heads, width = qkv.shape
        out = qkv.new_empty(patches, heads * width)
        _windows[(heads, runs.count)](
            qkv, angles.cos, angles.sin, runs.borders, out, scale * _LOG2_E, HEADS=heads, HALF=width // 2,
            ROWS=MAX_WINDOW, BLOCK=max(_LEAST, triton.next_power_of_2(width // 2)),
            BLOCK_WIDTH=max(_LEAST, triton.next_power_of_2(width)),
            num_warps=4,
        )  # fmt: skip
        return out

    def attend(self, qkv: torch.Tensor, runs: Runs, scale: float) -> torch.Tensor:
        patches, _, heads, width = qkv.shape
        out = qkv.new_empty(patches, heads * width)
        near = max(_LEAST, triton.next_power_of_2(width) // 2)  # 80 is 64 + 16: nothing is spent on a padding to 128
        _attend[(triton.cdiv(runs.longest, 128), heads, runs.count)](
            qkv, runs.borders, out, scale * _LOG2_E, HEADS=heads, WIDTH=width, NEAR=near,
            FAR=max(_LEAST, triton.next_power_of_2(width - near)), ROWS=128, COLUMNS=64, num_warps=8, num_stages=3,
        )  # fmt: skip
        return out

    def cut(self, pixels: torch.Tensor, places: Places, values: Values) -> torch.Tensor:
        patches, side = places.starts.shape[0], values.side
        out = torch.empty(patches, 3 * values.frames * side * side, dtype=values.dtype, device=pixels.device)
        _cut[(patches,)](
            pixels, places.starts, places.strides, values.table, out, SIDE=side, FRAMES=values.frames,
            BLOCK=triton.next_power_of_2(3 * side * side), num_warps=4,
        )  # fmt: skip
        return out


@triton.jit
def _add_norm(
    x, delta, weight, bias, out, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    value = tl.load(x + at, there, 0).to(tl.float32)
    if ADD:
        value += tl.load(delta + at, there, 0).to(tl.float32)
        tl.store(x + at, value.to(x.dtype.element_ty), there)
    if CENTRED:
        value = tl.where(there, value - tl.sum(value, 0) / WIDTH, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    value *= tl.load(weight + columns, there, 0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + columns, there, 0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), there)


@triton.jit
def _gate(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    there = columns < WIDTH
    gate = tl.load(x + row * (2 * WIDTH) + columns, there, 0).to(tl.float32)
    up = tl.load(x + row * (2 * WIDTH) + WIDTH + columns, there, 0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), there)


@triton.jit
def _rotate(
    qkv, cos, sin,
    HEADS: tl.constexpr, ALL: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    there = (heads < HEADS) & (within < HALF)[None, :]
    turn = tl.load(cos + row * HALF + within, within < HALF, 0)[None, :]
    lift = tl.load(sin + row * HALF + within, within < HALF, 0)[None, :]
    at = qkv + row * (ALL * 2 * HALF) + heads * (2 * HALF) + within[None, :]
    left = tl.load(at, there, 0).to(tl.float32)
    right = tl.load(at + HALF, there, 0).to(tl.float32)
    tl.store(at, (left * turn - right * lift).to(qkv.dtype.element_ty), there)
    tl.store(at + HALF, (right * turn + left * lift).to(qkv.dtype.element_ty), there)


@triton.jit
def _windows(
    qkv, cos, sin, borders, out, scale,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one window. ``scale`` is for powers of two."""
    head = tl.program_id(0)
    start = tl.load(borders + tl.program_id(1))
    end = tl.load(borders + tl.program_id(1) + 1)
    rows = start + tl.arange(0, ROWS)
    here = (rows < end)[:, None]
    rows = rows.to(tl.int64)[:, None]
    within = tl.arange(0, BLOCK)[None, :]
    half = here & (within < HALF)
    turn = tl.load(cos + rows * HALF + within, half, 0)
    lift = tl.load(sin + rows * HALF + within, half, 0)
    kind = qkv.dtype.element_ty
    query = qkv + rows * (6 * HEADS * HALF) + head * (2 * HALF)
    left = tl.load(query + within, half, 0).to(tl.float32)
    right = tl.load(query + HALF + within, half, 0).to(tl.float32)
    query_left = (left * turn - right * lift).to(kind)
    query_right = (right * turn + left * lift).to(kind)
    key = query + 2 * HEADS * HALF
    left = tl.load(key + within, half, 0).to(tl.float32)
    right = tl.load(key + HALF + within, half, 0).to(tl.float32)
    scores = tl.dot(query_left, tl.trans((left * turn - right * lift).to(kind)))
    scores += tl.dot(query_right, tl.trans((right * turn + left * lift).to(kind)))
    scores = tl.where((start + tl.arange(0, ROWS))[None, :] < end, scores * scale, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)[:, None]
    across = tl.arange(0, BLOCK_WIDTH)[None, :]
    whole = here & (across < 2 * HALF)
    value = tl.load(query + 4 * HEADS * HALF + across, whole, 0)
    found = tl.dot(weights.to(kind), value) / total
    tl.store(out + rows * (2 * HEADS * HALF) + head * (2 * HALF) + across, found.to(kind), whole)


@triton.jit
def _attend(
    qkv, borders, out, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head against their whole run. A head's values stand in two parts, NEAR and FAR."""
    head = tl.program_id(1)
    start = tl.load(borders + tl.program_id(2))
    end = tl.load(borders + tl.program_id(2) + 1)
    first = start + tl.program_id(0) * ROWS
    if first < end:
        rows = first + tl.arange(0, ROWS)
        here = (rows < end)[:, None]
        rows = rows.to(tl.int64)[:, None]
        near = tl.arange(0, NEAR)[None, :]
        far = NEAR + tl.arange(0, FAR)[None, :]
        base = qkv + head * WIDTH
        query = base + rows * (3 * HEADS * WIDTH)
        query_near = tl.load(query + near, here, 0)
        query_far = tl.load(query + far, here & (far < WIDTH), 0)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sum_near = tl.zeros([ROWS, NEAR], tl.float32)
        sum_far = tl.zeros([ROWS, FAR], tl.float32)
        whole = start + (end - start) // COLUMNS * COLUMNS
        for column in range(start, whole, COLUMNS):
            most, total, sum_near, sum_far = _attend_to(
                query_near, query_far, base, column + tl.arange(0, COLUMNS), end, most, total, sum_near, sum_far,
                scale, HEADS, WIDTH, NEAR, FAR, False,
            )  # fmt: skip
        if whole < end:
            most, total, sum_near, sum_far = _attend_to(
                query_near, query_far, base, whole + tl.arange(0, COLUMNS), end, most, total, sum_near, sum_far,
                scale, HEADS, WIDTH, NEAR, FAR, True,
            )  # fmt: skip
        to = out + rows * (HEADS * WIDTH) + head * WIDTH
        kind = out.dtype.element_ty
        tl.store(to + near, (sum_near / total[:, None]).to(kind), here)
        tl.store(to + far, (sum_far / total[:, None]).to(kind), here & (far < WIDTH))


@triton.jit
def _attend_to(
    query_near, query_far, base, columns, end, most, total, sum_near, sum_far, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Some more keys and values; in the LAST ones, some may lie behind the end."""
    key: tl.constexpr = HEADS * WIDTH
    near = tl.arange(0, NEAR)
    far = NEAR + tl.arange(0, FAR)
    at = base + key + columns.to(tl.int64) * (3 * key)
    if LAST:
        here = columns < end
        key_near = tl.load(at[None, :] + near[:, None], here[None, :], 0)
        key_far = tl.load(at[None, :] + far[:, None], here[None, :] & (far < WIDTH)[:, None], 0)
        value_near = tl.load(at[:, None] + key + near[None, :], here[:, None], 0)
        value_far = tl.load(at[:, None] + key + far[None, :], here[:, None] & (far < WIDTH)[None, :], 0)
    else:
        key_near = tl.load(at[None, :] + near[:, None])
        key_far = tl.load(at[None, :] + far[:, None], (far < WIDTH)[:, None], 0)
        value_near = tl.load(at[:, None] + key + near[None, :])
        value_far = tl.load(at[:, None] + key + far[None, :], (far < WIDTH)[None, :], 0)
    scores = tl.dot(query_far, key_far, tl.dot(query_near, key_near)) * scale
    if LAST:
        scores = tl.where(here[None, :], scores, float("-inf"))
    now = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp2(scores - now[:, None])
    fade = tl.exp2(most - now)
    total = total * fade + tl.sum(weights, 1)
    weights = weights.to(query_near.dtype)
    sum_near = tl.dot(weights, value_near, sum_near * fade[:, None])
    sum_far = tl.dot(weights, value_far, sum_far * fade[:, None])
    return now, total, sum_near, sum_far


@triton.jit
def _cut(pixels, starts, strides, table, out, SIDE: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr):
    patch = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + patch)
    stride = tl.load(strides + patch)
    area: tl.constexpr = SIDE * SIDE
    at = tl.arange(0, BLOCK)
    there = at < 3 * area
    channel = at // area
    place = at % area
    byte = tl.load(pixels + start + (place // SIDE) * stride + (place % SIDE) * 3 + channel, there, 0)
    value = tl.load(table + channel * 256 + byte.to(tl.int32), there, 0).to(out.dtype.element_ty)
    first = out + patch * (3 * FRAMES * area) + channel * (FRAMES * area) + place
    for frame in tl.static_range(FRAMES):
        tl.store(first + frame * area, value, there)
