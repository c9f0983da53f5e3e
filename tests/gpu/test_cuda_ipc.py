"""What memory that several processes have open does on a real GPU, under the transport that rests on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epdctl.transfer.base import Piece
from epdctl.transfer.cuda import open_cuda
from epdctl.transfer.cuda_ipc import CudaIpcMover
from epdctl.transfer.movers import Put
from epdctl.transfer.onesided import OneSidedTransport
from tests.support.ranks import run
from tests.support.transfer_ends import decoded, open_at, pattern, receiving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda:0")
GUARD_SECONDS = 60.0
sleep: Callable[[int], None] = torch.cuda._sleep


def test_memory_of_a_dead_peer_is_free_when_its_writer_has_withdrawn(sockets: Path) -> None:
    size, endpoint = 8 << 30, f"ipc://{sockets}/there"

    async def test() -> None:
        writer = open_at("cuda-ipc", f"ipc://{sockets}/writer", "encoder/0")
        assert isinstance(writer, OneSidedTransport)
        try:
            with receiving("cuda-ipc", endpoint, size) as there:
                lease = decoded(await there.ask("lease", 1000))
                await writer.write(lease, [Piece(pattern(1000, 1).to(GPU), 0)], seconds=GUARD_SECONDS)
                there.kill()
            held = torch.cuda.mem_get_info(GPU)[0]
            writer.withdraw(lease.pool.endpoint)
            while torch.cuda.mem_get_info(GPU)[0] < held + size:  # noqa: ASYNC110 - a driver has no events
                await asyncio.sleep(0)
        finally:
            await writer.close()

    run(test())


def test_a_write_waits_for_its_data_and_for_nothing_queued_behind(sockets: Path) -> None:
    async def test() -> None:
        mover = CudaIpcMover(open_cuda(GPU), GPU)
        with receiving("cuda-ipc", f"ipc://{sockets}/there") as there:
            lease = decoded(await there.ask("lease", 1000))
            writer = open_at("cuda-ipc", f"ipc://{sockets}/writer", "encoder/0")
            try:
                await writer.write(lease, [Piece(pattern(1000, 1).to(GPU), 0)], seconds=GUARD_SECONDS)  # it is warm
                assert isinstance(writer, OneSidedTransport)
                remote = next(iter(writer._peers.values()))._remotes[lease.pool.pool].result()
                made_from = pattern(1000, 2).to(GPU)
                sleep(100_000_000)  # cycles: what is written is made late
                data = made_from + 1
                made = mover.made()
                sleep(10_000_000_000)  # about five seconds
                behind: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                behind.record()

                def write() -> None:
                    mover.wait(made)
                    remote.put([Put(data, lease.extents[0].offset)], threading.Event())

                await asyncio.to_thread(write)
                assert not behind.query(), "it waited for what was queued behind its data"
                assert await there.ask("sum") == int((pattern(1000, 2) + 1).sum())
            finally:
                await writer.close()

    run(test())
