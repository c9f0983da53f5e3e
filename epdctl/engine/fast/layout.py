"""Where every patch of a batch stands: its order, its position, its window. Numbers on the CPU, made once per grid.

Patches come as image processors give them, the patches of one embedding behind each other. Towers with windows work
in window order, so that a window is a run of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Geometry", "Grid", "Layout", "lay_out"]

Grid = tuple[int, int, int]  # time, height and width, in patches
Ints = NDArray[np.int64]

_KEPT = 512  # pictures of one service come in few sizes


@dataclass(frozen=True, slots=True)
class Geometry:
    """``merge``: patches per side of one embedding. ``window``: embeddings per side of one window, 0 for none."""

    merge: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch of P patches and E embeddings. ``rows``, ``columns``: [P], where each patch is in its picture.

    ``order``: [E], which embedding of the input stands at each place; ``None`` where the order is the input's.
    ``back``: [E], its inverse. ``pictures``, ``windows``: lengths in patches of what attends to itself.
    """

    rows: Ints
    columns: Ints
    order: Ints | None
    back: Ints | None
    pictures: Ints
    windows: Ints

    @property
    def patches(self) -> int:
        return len(self.rows)


def lay_out(grids: Sequence[Grid], geometry: Geometry) -> Layout:
    """All pictures of a batch, one behind the other."""
    parts = [_one(grid, geometry) for grid in grids]
    starts = np.cumsum([0, *(part.patches // geometry.merge**2 for part in parts)])

    def moved(orders: Sequence[Ints | None]) -> Ints | None:
        placed = [order + start for order, start in zip(orders, starts, strict=False) if order is not None]
        return np.concatenate(placed) if placed else None

    return Layout(
        rows=np.concatenate([part.rows for part in parts]),
        columns=np.concatenate([part.columns for part in parts]),
        order=moved([part.order for part in parts]),
        back=moved([part.back for part in parts]),
        pictures=np.concatenate([part.pictures for part in parts]),
        windows=np.concatenate([part.windows for part in parts]),
    )


@lru_cache(_KEPT)
def _one(grid: Grid, geometry: Geometry) -> Layout:
    rows, columns = _places(grid, geometry.merge)
    pictures = np.full(grid[0], grid[1] * grid[2])
    if not geometry.window:
        return Layout(rows, columns, None, None, pictures, pictures)
    order, lengths = _windows(grid, geometry)
    return Layout(
        rows=rows.reshape(-1, geometry.merge**2)[order].reshape(-1),
        columns=columns.reshape(-1, geometry.merge**2)[order].reshape(-1),
        order=order,
        back=np.argsort(order),
        pictures=pictures,
        windows=lengths * geometry.merge**2,
    )


def _places(grid: Grid, merge: int) -> tuple[Ints, Ints]:
    """Row and column of each patch, in the processor's order."""
    time, height, width = grid
    shape = (height // merge, merge, width // merge, merge)
    rows, columns = np.indices((height, width)).reshape(2, *shape).transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return np.tile(rows, time), np.tile(columns, time)


def _windows(grid: Grid, geometry: Geometry) -> tuple[Ints, Ints]:
    """The embeddings in window order, and how many each window has; windows at the far edges are smaller."""
    time, height, width = grid[0], grid[1] // geometry.merge, grid[2] // geometry.merge
    row, column = np.indices((height, width)) // geometry.window
    across = -(-width // geometry.window)
    window = (row * across + column).reshape(-1)
    order = np.argsort(window, kind="stable")
    counts = np.bincount(window)
    frames = np.arange(time)[:, None] * (height * width)
    return (frames + order).reshape(-1), np.tile(counts, time)
