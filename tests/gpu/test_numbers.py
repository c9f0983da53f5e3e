"""What a language model in 16 bits does differently on a GPU: chunks behind others, products in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from epdctl.engine.attention import PagedBatch, Span, paged_attention
from epdctl.engine.kv import KvPool
from epdctl.engine.wide import product
from epdctl.ids import LocalGpu, RankName
from epdctl.rank.device import prepare_device
from epdctl.wire.config import ModelConfig, RankConfig
from epdctl.wire.serve import KvLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = torch.device("cuda", 0)
HEADS, SHARED, WIDTH, PAGE = 28, 4, 128, 16
SPANS = [(0, 40), (40, 33), (100, 1), (0, 1), (64, 129)]  # start, count


class Layer(torch.nn.Module):
    layer_idx = 0


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=GPU, dtype=torch.bfloat16)


@pytest.mark.parametrize(("start", "count"), SPANS)
def test_a_row_sees_itself_and_all_before_it(start: int, count: int) -> None:
    layout = KvLayout(page_size=PAGE, layers=1, kv_heads=SHARED, head_dim=WIDTH, dtype="bfloat16")
    pool = KvPool(layout, 16, GPU)
    key, value = draw(1, SHARED, start + count, WIDTH), draw(1, SHARED, start + count, WIDTH)
    query = draw(1, HEADS, start + count, WIDTH)
    pages = list(range(15, -1, -1))
    for span in filter(lambda span: span.count, (Span(pages, 0, start), Span(pages, start, count))):
        rows = slice(span.start, span.end)
        one, two, three = (each[:, :, rows].float() for each in (query, key, value))  # as a widened model gives them
        paged = PagedBatch.build(pool, [span])
        found, _ = paged_attention(Layer(), one, two, three, None, paged=paged, scaling=WIDTH**-0.5)
    one, two, three = (each.float() for each in (query, key, value))
    due = functional.scaled_dot_product_attention(one, two, three, is_causal=True, enable_gqa=True)
    assert found.dtype == torch.bfloat16
    difference = found.float() - due[:, :, start:].transpose(1, 2)
    assert float(difference.norm() / due[:, :, start:].norm()) < 0.01


def test_no_attention_is_planned_for_every_length() -> None:
    """A plan of cuDNN's takes 54 ms, and an answer has as many lengths of keys as it has tokens."""
    model = ModelConfig(path="", name="", family="qwen2_5_vl")
    name = RankName("decode/0")
    prepare_device(RankConfig(rank=name, stage=name.stage, service="", model=model, devices=[LocalGpu(0)]))
    query, keys = draw(1, HEADS, 1, WIDTH), draw(1, SHARED, 77, WIDTH)
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
    called = {event.key for event in recording.key_averages()}
    assert any("flash" in key for key in called)
    assert not any("cudnn" in key for key in called)


@pytest.mark.parametrize("rows", [0, 1, 3, 2048])
def test_products_keep_the_digits_of_float32(rows: int) -> None:
    x, weight = draw(1, rows, 512), draw(640, 512)
    found = product(x.float(), weight)
    due = x.double() @ weight.double().T
    assert found.dtype == torch.float32
    assert found.shape == due.shape
    assert float((found - due).norm()) <= 1e-5 * float(due.norm())
