"""A tower's forward over packed pictures of any sizes: no host waits for the device, and no split per window."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from epdctl.engine.api import LoadProgress
from epdctl.engine.fast.layout import Geometry, Grid, Layout, lay_out
from epdctl.engine.fast.ops import MAX_WINDOW, Angles, Ops, Places, Runs, Values, kernels_for
from epdctl.engine.fast.parts import Block, Linear, Merger, Mlp, Unsupported, take_block, take_linear, take_merger

__all__ = ["FastTower", "Features", "fast_tower"]

_KEPT = 8  # placed batches: with pictures of one size, the same come again


@dataclass(frozen=True, slots=True)
class Features:
    """``pooled``: [embeddings, width] in the order of the pictures; ``deep``: the same for each DeepStack layer."""

    pooled: torch.Tensor
    deep: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the library's module is made of. ``full``: layers that attend over whole pictures."""

    embed: Linear
    side: int
    frames: int
    places: torch.Tensor | None  # learned embedding of a square grid of positions: [places², width]
    frequencies: torch.Tensor
    blocks: tuple[Block, ...]
    full: frozenset[int]
    merger: Merger
    deep: Mapping[int, Merger]
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class _Placed:
    """A layout on the device."""

    layout: Layout
    order: torch.Tensor | None
    back: torch.Tensor | None
    angles: Angles
    pictures: Runs
    windows: Runs
    added: torch.Tensor | None  # learned positions, [patches, width]


def fast_tower(
    module: Any, table: torch.Tensor | None = None, *, ops: Ops | None = None, wide: bool = False
) -> FastTower:
    """``module``: a vision tower of transformers, loaded, on its device. Its weights are shared where they can be.

    ``table``: [3, 256], what the image processor makes of a byte of each channel, for 8-bit pictures. ``ops``: other
    steps than this device's kernels. ``wide``: 16-bit layers add to a sum in float32. Raises Unsupported.
    """
    weight = next(module.parameters())
    ops = ops or kernels_for(weight.device, weight.dtype)
    if ops is None:  # asked before anything is taken: what is taken is padded, a copy
        raise Unsupported(f"there are no kernels for {weight.dtype} on {weight.device.type}")
    table = None if table is None else table.to(weight.device, torch.float32)
    return FastTower(_take(module), ops, table, wide=wide)


def _take(module: Any) -> Parts:
    for needed in ("patch_embed", "blocks", "merger", "rotary_pos_emb", "spatial_merge_size", "patch_size"):
        if not hasattr(module, needed):
            raise Unsupported(f"{type(module).__name__} has no {needed}")
    blocks = tuple(take_block(block) for block in module.blocks)
    if blocks[0].head_dim % 8 or not 16 <= blocks[0].head_dim <= 128:
        raise Unsupported(f"heads of {blocks[0].head_dim} values")
    window = getattr(module, "window_size", 0) // module.spatial_merge_size // module.patch_size
    full = frozenset(getattr(module, "fullatt_block_indexes", range(len(blocks))))
    deep = zip(
        getattr(module, "deepstack_visual_indexes", ()), getattr(module, "deepstack_merger_list", ()), strict=True
    )
    return Parts(
        embed=take_linear(module.patch_embed.proj),
        side=int(module.patch_size),
        frames=int(module.patch_embed.temporal_patch_size),
        places=module.pos_embed.weight.detach() if hasattr(module, "pos_embed") else None,
        frequencies=module.rotary_pos_emb.inv_freq.float(),
        blocks=blocks,
        full=full,
        merger=take_merger(module.merger),
        deep={layer: take_merger(merger) for layer, merger in deep},
        geometry=Geometry(int(module.spatial_merge_size), int(window)),
    )


class FastTower:
    """Used from one thread. Launches work and returns; the device may still be at it."""

    def __init__(self, parts: Parts, ops: Ops, table: torch.Tensor | None, *, wide: bool) -> None:
        self._parts = parts
        self._ops = ops
        self._table = table
        self._wide = wide
        self._placed: OrderedDict[tuple[Grid, ...], _Placed] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self._parts.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parts.embed.weight.dtype

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor], grids: Sequence[Grid]) -> Features:
        """One forward over all pictures. ``pixels``: of each, either patches as the image processor gives them,
        [patches, values], or 8-bit [height, width, 3], resized already.
        """
        placed = self._place(tuple(grids))
        if pixels[0].dtype == torch.uint8:
            patches = self._cut(pixels, placed.layout, grids)
        else:
            patches = self._sorted(pixels, placed)
        return self._forward(patches, placed)

    @torch.inference_mode()
    def warm_up(self, progress: LoadProgress) -> None:
        """Compile every kernel and make every handle, on pictures of a few sizes; take memory for eight at once."""
        side = 4 * self._parts.geometry.merge
        sizes: list[list[Grid]] = [[(1, side, side)], [(1, side, side), (1, side, 2 * side)], [(1, 4 * side, 4 * side)]]
        if self.device.type == "cuda":
            sizes.append([(1, 5 * side, 5 * side)] * 8)
        for done, grids in enumerate(sizes):
            progress(done, len(sizes))
            self.encode([self._blank(grid) for grid in grids], grids)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        progress(len(sizes), len(sizes))

    def _blank(self, grid: Grid) -> torch.Tensor:
        side = self._parts.side
        if self._table is not None:
            return torch.zeros(grid[1] * side, grid[2] * side, 3, dtype=torch.uint8)
        return torch.zeros(grid[1] * grid[2], self._parts.embed.weight.shape[1])

    def _sent(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """To the device, without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _place(self, grids: tuple[Grid, ...]) -> _Placed:
        placed = self._placed.pop(grids, None)
        if placed is None:
            placed = self._placed_anew(grids)
        self._placed[grids] = placed
        if len(self._placed) > _KEPT:
            self._placed.popitem(last=False)
        return placed

    def _placed_anew(self, grids: tuple[Grid, ...]) -> _Placed:
        layout = lay_out(grids, self._parts.geometry)
        rows, columns = self._sent(layout.rows), self._sent(layout.columns)
        return _Placed(
            layout=layout,
            order=None if layout.order is None else self._sent(layout.order),
            back=None if layout.back is None else self._sent(layout.back),
            angles=self._angles(rows, columns),
            pictures=self._runs(layout.pictures),
            windows=self._runs(layout.windows),
            added=None if self._parts.places is None else self._learned(rows, columns, grids),
        )

    def _angles(self, rows: torch.Tensor, columns: torch.Tensor) -> Angles:
        angles = torch.cat([each[:, None].float() * self._parts.frequencies for each in (rows, columns)], dim=-1)
        return Angles(angles.cos(), angles.sin())

    def _runs(self, lengths: np.ndarray[Any, Any]) -> Runs:
        borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return Runs(self._sent(borders), len(lengths), int(lengths.max()))

    def _learned(self, rows: torch.Tensor, columns: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """The learned square of positions, drawn out to each picture: bilinear, corners on corners."""
        places = self._parts.places
        assert places is not None
        square = int(places.shape[0] ** 0.5)
        heights, widths = (
            self._sent(np.repeat([g[axis] for g in grids], [np.prod(g) for g in grids])) for axis in (1, 2)
        )
        found = torch.zeros(rows.shape[0], places.shape[1], dtype=torch.float32, device=self.device)
        down, across = _taps(rows, heights, square), _taps(columns, widths, square)
        for row, weight in down:
            for column, other in across:
                found += places[row * square + column] * (weight * other)[:, None]
        return found if self._wide else found.to(self.dtype)

    def _sorted(self, pixels: Sequence[torch.Tensor], placed: _Placed) -> torch.Tensor:
        patches = torch.cat([each.to(self.device, non_blocking=True) for each in pixels]).to(self.dtype)
        if placed.order is None:
            return patches
        together = self._parts.geometry.merge**2
        return patches.view(-1, together, patches.shape[1])[placed.order].view(-1, patches.shape[1])

    def _cut(self, pixels: Sequence[torch.Tensor], layout: Layout, grids: Sequence[Grid]) -> torch.Tensor:
        assert self._table is not None, "8-bit pictures for a tower that was told no table"
        side = self._parts.side
        sizes = [each.numel() for each in pixels]
        together = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        for part, each in zip(torch.split(together, sizes), pixels, strict=True):
            part.copy_(each.reshape(-1), non_blocking=True)
        counts = [int(np.prod(grid)) for grid in grids]
        first = np.repeat(np.cumsum([0, *sizes[:-1]]), counts)
        strides = np.repeat([3 * side * grid[2] for grid in grids], counts)
        starts = first + layout.rows * side * strides + layout.columns * side * 3
        places = Places(self._sent(starts), self._sent(strides))
        return self._ops.cut(together, places, Values(self._table, side, self._parts.frames, self.dtype))

    def _forward(self, patches: torch.Tensor, placed: _Placed) -> Features:
        parts, ops = self._parts, self._ops
        x = parts.embed.wide(patches) if self._wide else parts.embed(patches)
        if placed.added is not None:
            x += placed.added
        deep = []
        normed = ops.norm(x, parts.blocks[0].norm1)
        for layer, block in enumerate(parts.blocks):
            attended = self._attend(block, block.qkv(normed), placed, whole=layer in parts.full)
            normed = ops.add_norm(x, block.projection(attended), block.norm2)
            following = parts.blocks[layer + 1].norm1 if layer + 1 < len(parts.blocks) else block.norm1
            normed = ops.add_norm(x, self._through(block.mlp, normed), following)
            if layer in parts.deep:
                deep.append(self._merged(parts.deep[layer], x, placed))
        return Features(self._merged(parts.merger, x, placed), tuple(deep))

    def _attend(self, block: Block, qkv: torch.Tensor, placed: _Placed, *, whole: bool) -> torch.Tensor:
        qkv = qkv.view(-1, 3, block.heads, block.head_dim)
        runs = placed.pictures if whole else placed.windows
        if runs.longest <= MAX_WINDOW:
            return self._ops.windows(qkv, placed.angles, runs, block.scale)
        self._ops.rotate(qkv, placed.angles)
        return self._ops.attend(qkv, runs, block.scale)

    def _through(self, mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
        hidden = mlp.first(x)
        return mlp.second(self._ops.gate(hidden) if mlp.gated else mlp.act(hidden))

    def _merged(self, merger: Merger, x: torch.Tensor, placed: _Placed) -> torch.Tensor:
        wide = merger.first.weight.shape[1]
        normed = self._ops.norm(x.view(-1, wide) if merger.wide else x, merger.norm)
        normed = normed.view(-1, wide)
        inner = merger.act(merger.first.wide(normed) if self._wide else merger.first(normed))
        merged = merger.second(inner.to(self.dtype))
        return merged if placed.back is None else merged[placed.back]


def _taps(index: torch.Tensor, size: torch.Tensor, square: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two places on a side of ``square`` that stand for each ``index`` of ``size``, and their weights."""
    at = index.float() * (square - 1) / (size - 1).clamp(min=1)
    low = at.floor()
    part = at - low
    return [(low.long(), 1 - part), ((low.long() + 1).clamp(max=square - 1), part)]
