"""The memory of a KV cache: one block of bytes, a page of all layers contiguous in it. Who owns a page, others know."""

from __future__ import annotations

from collections.abc import Callable

import torch

from epdctl.errors import LoadError, RegistrationFailed
from epdctl.wire.serve import KvLayout

__all__ = ["KvPool", "Memory", "own_memory"]

Memory = Callable[[int, torch.device], torch.Tensor]  # so many bytes there, as 1-D uint8


def own_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class KvPool:
    """``memory``: 1-D uint8, what a transport registers. ``view``: the same bytes as
    [pages, layers, 2 (key, value), page_size, kv_heads, head_dim] of the layout's dtype.

    Pages outermost, layers inside: a page that moves to another rank is one contiguous write. ``memory`` of the
    constructor: who makes it, a transport where peers are to reach it.
    Raises LoadError when the memory is not to be had.
    """

    def __init__(
        self, layout: KvLayout, pages: int, device: torch.device | None = None, memory: Memory = own_memory
    ) -> None:
        self.layout = layout
        self.pages = pages
        self.memory = _faulted_in(pages * layout.page_bytes, device or torch.device("cpu"), memory)
        self.view = self.memory.view(getattr(torch, layout.dtype)).view(
            pages, layout.layers, 2, layout.page_size, layout.kv_heads, layout.head_dim
        )

    @property
    def device(self) -> torch.device:
        return self.memory.device


def _faulted_in(nbytes: int, device: torch.device, memory: Memory) -> torch.Tensor:
    """Written once at creation, so that too little memory shows now and not in the middle of a request."""
    try:
        return memory(nbytes, device).fill_(0)
    except (MemoryError, RuntimeError, RegistrationFailed) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise LoadError(
            f"no memory on {device} for a KV pool of {nbytes / 2**20:.0f} MiB: {str(error).splitlines()[0]}",
            hint="give the stage a smaller kv_tokens, or more memory",
        ) from error
