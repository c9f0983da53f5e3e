"""Embeddings of a mono rank on a GPU: from the tower's memory into the slot, and never through the host's."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from epdctl.ids import Incarnation, RankName
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.landing import Owner
from epdctl.transfer.memory import Exchange, MemoryTransport
from epdctl.transfer.pool import Pool
from epdctl.transfer.tensors import as_bytes, spread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("checksum", [False, True])
def test_bytes_stay_on_the_gpu(checksum: bool) -> None:
    """Without checksums, which are the host's work."""
    copies: list[str] = []

    async def scene() -> None:
        owner = Owner(RankName("mono/0"), Incarnation(1), "secret", checksum)
        exchange = Exchange()
        reader, writer = MemoryTransport("reader", owner, exchange), MemoryTransport("writer", owner, exchange)
        pool = Pool("embeddings", reader.allocate(64 << 20, GPU), RangeAllocator(64 << 20))
        address = reader.register(pool)
        made = torch.randn(5000, 2048, device=GPU)
        lease = pool.lease(made.nbytes, "r", seconds=60)
        slot = lease.remote(address)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recording:
            await writer.write(slot, spread(as_bytes(made), slot.extents), seconds=60)
            torch.cuda.synchronize()
        copies.extend(event.key for event in recording.key_averages() if "Memcpy" in event.key)
        offset = lease.extents[0].offset
        assert torch.equal(pool.memory[offset : offset + made.nbytes].view(torch.float32).view(made.shape), made)

    asyncio.run(scene())
    assert copies
    assert any("DtoH" in copy for copy in copies) == checksum
    assert not any("HtoD" in copy for copy in copies)
