"""Tensors as bytes and bytes as tensors, without copies."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from epdctl.errors import RegistrationFailed, TransferError
from epdctl.transfer.base import Piece
from epdctl.wire.transfer import Extent, TensorSpec

__all__ = ["as_bytes", "dtype_named", "require_room", "spec_of", "spread", "view_as"]


def dtype_named(name: str) -> torch.dtype:
    """``float32`` → torch.float32. Raises TransferError."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TransferError(f"no dtype is called {name!r}")
    return dtype


def require_room(nbytes: int, device: torch.device) -> None:
    """A pool is written whole when it is made: beyond what this host has left, that raises nothing, but wakes the
    kernel's killer, and not only for us. Raises RegistrationFailed.
    """
    available = psutil.virtual_memory().available
    if device.type == "cpu" and nbytes > available:
        raise RegistrationFailed(f"{nbytes >> 20} MiB wanted, {available >> 20} MiB of this host's memory are left")


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), nbytes=tensor.nbytes)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A 1-D uint8 view; a copy only where ``tensor`` is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def view_as(memory: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The front of 1-D uint8 ``memory`` as a tensor of ``spec``. Raises TransferError when it does not fit."""
    dtype = dtype_named(spec.dtype)
    size = dtype.itemsize
    for dimension in spec.shape:
        size *= dimension
    if size != spec.nbytes or min(spec.shape, default=0) < 0 or size > memory.numel():
        raise TransferError(f"{spec.shape} of {spec.dtype} in {spec.nbytes} bytes does not fit {memory.numel()} bytes")
    return memory[:size].view(dtype).view(spec.shape)


def spread(data: torch.Tensor, extents: Sequence[Extent]) -> list[Piece]:
    """Lay 1-D uint8 ``data`` over ``extents`` from the front. Raises TransferError when they are too small."""
    pieces = []
    start = 0
    for number, extent in enumerate(extents):
        part = data[start : start + extent.nbytes]
        if part.numel():
            pieces.append(Piece(part, number))
        start += part.numel()
    if start < data.numel():
        raise TransferError(f"{data.numel()} bytes do not fit a slot of {start}")
    return pieces
