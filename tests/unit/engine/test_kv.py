"""The bytes of a KV pool: pages outermost, a page of all layers in one piece."""

from __future__ import annotations

import pytest
import torch

from epdctl.engine.kv import KvPool
from epdctl.errors import LoadError
from epdctl.wire.serve import KvLayout

LAYOUT = KvLayout(page_size=4, layers=3, kv_heads=2, head_dim=8, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_view_and_the_bytes_are_the_same_memory(dtype: str) -> None:
    layout = KvLayout(page_size=4, layers=3, kv_heads=2, head_dim=8, dtype=dtype)
    pool = KvPool(layout, 5)
    assert pool.view.shape == (5, 3, 2, 4, 2, 8)
    assert pool.memory.shape == (5 * layout.page_bytes,)
    assert pool.memory.dtype == torch.uint8
    pool.view[2] = 1.5
    page = pool.memory.view(5, layout.page_bytes)[2]
    assert bool((page.view(pool.view.dtype) == 1.5).all())
    assert int(pool.memory.count_nonzero()) == int(page.count_nonzero()) > 0


def test_a_page_is_one_piece() -> None:
    pool = KvPool(LAYOUT, 3)
    assert pool.view[1].is_contiguous()
    assert pool.memory.data_ptr() + LAYOUT.page_bytes == pool.view[1].data_ptr()


def test_memory_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(LoadError, match="no memory on cpu for a KV pool") as caught:
        KvPool(LAYOUT, 1 << 50)
    assert "kv_tokens" in str(caught.value.hint)
