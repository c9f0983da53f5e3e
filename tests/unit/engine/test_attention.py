"""Attention over pages against attention written out, for spans of every kind in one batch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epdctl.engine.attention import PagedBatch, Span, paged_attention
from epdctl.engine.kv import KvPool
from epdctl.engine.pages import PageAllocator, pages_for
from epdctl.wire.serve import KvLayout

HEADS, KV_HEADS, DIM, PAGE, LAYERS = 4, 2, 8, 4, 2
MODULE = cast("torch.nn.Module", SimpleNamespace(layer_idx=1))


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int) -> torch.Tensor:
    """[count, heads, dim] against [length, kv_heads, dim]; one row and head at a time."""
    rows = []
    for row in range(query.shape[0]):
        sees = start + row + 1
        for head in range(HEADS):
            group = head * KV_HEADS // HEADS
            weights = (key[:sees, group] @ query[row, head] / math.sqrt(DIM)).softmax(0)
            rows.append(weights @ value[:sees, group])
    return torch.stack(rows).view(-1, HEADS, DIM)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 99))
def test_every_span_sees_its_own_past_and_nothing_else(shapes: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    pool = KvPool(KvLayout(page_size=PAGE, layers=LAYERS, kv_heads=KV_HEADS, head_dim=DIM, dtype="float32"), 40)
    pool.view.fill_(torch.nan)  # what was never written must never be read
    allocator = PageAllocator(40)
    allocator.take(seed % 5)
    truth = [torch.randn(2, start + count, KV_HEADS, DIM) for start, count in shapes]
    spans = [Span(allocator.take(pages_for(start + count, PAGE)), start, count) for start, count in shapes]
    for span, (key, value) in zip(spans, truth, strict=True):
        if span.start:
            past = PagedBatch.build(pool, [Span(span.pages, 0, span.start)])
            past.write(1, key[: span.start], value[: span.start])
    query = torch.randn(sum(count for _, count in shapes), HEADS, DIM)
    new = torch.cat([both[:, span.start :] for span, both in zip(spans, truth, strict=True)], dim=1)
    output, _ = paged_attention(
        MODULE,
        query.transpose(0, 1).unsqueeze(0),
        new[0].transpose(0, 1).unsqueeze(0),
        new[1].transpose(0, 1).unsqueeze(0),
        None,
        paged=PagedBatch.build(pool, spans),
        scaling=DIM**-0.5,
    )
    row = 0
    for span, (key, value) in zip(spans, truth, strict=True):
        due = written_out(query[row : row + span.count], key, value, span.start)
        torch.testing.assert_close(output[0, row : row + span.count], due, atol=1e-5, rtol=1e-5)
        row += span.count
    assert bool(pool.view[:, 0].isnan().all()), "another layer was written"
