"""Attention over KV pages for a packed batch of sequences, as an attention implementation that transformers can call.

What a step needs travels through the forward as the keyword ``paged``; there is no state of the module, so two engines
in one process do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from epdctl.engine.kv import KvPool

__all__ = ["PAGED", "PagedBatch", "Span", "paged_attention", "register"]

PAGED = "epdctl_paged"  # without "flash" in it: that word would make transformers prepare what nobody reads


@dataclass(frozen=True, slots=True)
class Span:
    """The part of one sequence that a step computes: tokens ``start`` … ``start + count - 1``."""

    pages: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def range(self) -> range:
        return range(self.start, self.end)


@dataclass(frozen=True, slots=True)
class _Reach:
    """One span as attention sees it: rows of the packed batch, and the keys they may look at."""

    rows: slice
    pages: torch.Tensor  # [pages in use] int64
    length: int  # keys
    mask: torch.Tensor | None  # [count, length]; None where every row sees every key, or plain causal does
    causal: bool


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Built once per step, read by every layer."""

    view: torch.Tensor  # the pool: [pages, layers, 2, page_size, kv_heads, head_dim]
    page_of: torch.Tensor  # [tokens] int64
    offset_of: torch.Tensor  # [tokens] int64, within the page
    reaches: tuple[_Reach, ...]

    @classmethod
    def build(cls, pool: KvPool, spans: Sequence[Span]) -> PagedBatch:
        page_size = pool.layout.page_size
        pages = [span.pages[index // page_size] for span in spans for index in span.range]
        offsets = [index % page_size for span in spans for index in span.range]
        return cls(
            view=pool.view,
            page_of=torch.tensor(pages, dtype=torch.int64, device=pool.device),
            offset_of=torch.tensor(offsets, dtype=torch.int64, device=pool.device),
            reaches=tuple(_reaches(spans, pool)),
        )

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """``key``, ``value``: [tokens, kv_heads, head_dim]."""
        self.view[:, layer, 0].index_put_((self.page_of, self.offset_of), key)
        self.view[:, layer, 1].index_put_((self.page_of, self.offset_of), value)

    def read(self, layer: int, reach: _Reach) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one sequence, gathered: [1, kv_heads, length, head_dim] each."""
        both = self.view[reach.pages, layer].transpose(0, 1)  # [2, pages, page_size, kv_heads, head_dim]
        key, value = both.flatten(1, 2)[:, : reach.length].transpose(1, 2).unbind(0)
        return key.unsqueeze(0), value.unsqueeze(0)


def _reaches(spans: Sequence[Span], pool: KvPool) -> list[_Reach]:
    reaches, row = [], 0
    for span in spans:
        used = span.pages[: -(-span.end // pool.layout.page_size)]
        reaches.append(
            _Reach(
                rows=slice(row, row + span.count),
                pages=torch.tensor(used, dtype=torch.int64, device=pool.device),
                length=span.end,
                mask=_mask(span, pool),
                causal=span.start == 0 and span.count > 1,
            )
        )
        row += span.count
    return reaches


def _mask(span: Span, pool: KvPool) -> torch.Tensor | None:
    """A row sees itself and all before it. sdpa's own causal mask is right only from the sequence's beginning on.

    The flash kernel has the other one too, and knows no mask of numbers: with one, heads that share keys would go
    through whole matrices of scores, at several times the cost.
    """
    if span.start == 0 or span.count == 1:
        return None
    if pool.device.type == "cuda" and pool.view.dtype.itemsize == 2:
        return causal_lower_right(span.count, span.end)
    rows = torch.arange(span.start, span.end, device=pool.device).unsqueeze(1)
    return torch.arange(span.end, device=pool.device).unsqueeze(0) <= rows


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, tokens, head_dim] in, [1, tokens, heads, head_dim] out, in the
    format of the pages.
    """
    paged = kwargs["paged"]
    if not isinstance(paged, PagedBatch):
        raise TypeError("the paged attention was called without its PagedBatch")
    layer, scale = int(module.layer_idx), kwargs.get("scaling")  # type: ignore[arg-type]
    query, key, value = (each.to(paged.view.dtype) for each in (query, key, value))
    paged.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = torch.empty_like(query)
    for reach in paged.reaches:
        keys, values = paged.read(layer, reach)
        output[:, :, reach.rows] = functional.scaled_dot_product_attention(
            query[:, :, reach.rows],
            keys,
            values,
            attn_mask=reach.mask,
            is_causal=reach.causal,
            scale=scale if isinstance(scale, float) else None,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    return output.transpose(1, 2), None


def register() -> None:
    """Makes PAGED known to transformers; as often as one likes."""
    from transformers import AttentionInterface

    AttentionInterface.register(PAGED, paged_attention)
