"""The steps of a fast tower between its matrix products, as an interface: Triton kernels, or plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from epdctl.engine.fast.parts import Norm

__all__ = ["MAX_WINDOW", "Angles", "Ops", "Places", "Runs", "Values", "kernels_for"]

MAX_WINDOW = 64  # patches that one program of the window kernel holds


@dataclass(frozen=True, slots=True)
class Angles:
    """[patches, head_dim / 2] float32 each."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class Runs:
    """Rows that attend to each other. ``borders``: [runs + 1] int32, cumulative, on the device."""

    borders: torch.Tensor
    count: int
    longest: int


@dataclass(frozen=True, slots=True)
class Places:
    """Of each patch, in bytes: where its first pixel is, and how far the next row of its picture. [patches] int64."""

    starts: torch.Tensor
    strides: torch.Tensor


@dataclass(frozen=True, slots=True)
class Values:
    """How bytes become the values of a patch. ``table``: [3, 256] float32, what a byte of a channel stands for."""

    table: torch.Tensor
    side: int
    frames: int
    dtype: torch.dtype


class Ops(Protocol):
    """See plain.PlainOps for what each computes. Numbers inside are float32, rounded once at the end."""

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor: ...

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, norm: Norm) -> torch.Tensor: ...

    def gate(self, x: torch.Tensor) -> torch.Tensor: ...

    def rotate(self, qkv: torch.Tensor, angles: Angles) -> None: ...

    def windows(self, qkv: torch.Tensor, angles: Angles, runs: Runs, scale: float) -> torch.Tensor: ...

    def attend(self, qkv: torch.Tensor, runs: Runs, scale: float) -> torch.Tensor: ...

    def cut(self, pixels: torch.Tensor, places: Places, values: Values) -> torch.Tensor: ...


def kernels_for(device: torch.device, dtype: torch.dtype) -> Ops | None:
    """None where there is nothing faster than transformers' own: on a CPU, in float32, without Triton."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from epdctl.engine.fast.kernels import KernelOps
    except ImportError:
        return None
    return KernelOps()
