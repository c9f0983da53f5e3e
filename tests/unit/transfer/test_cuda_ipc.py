"""What stands around CUDA's memory handles, with a process's own memory in place of GPUs."""

from __future__ import annotations

import random
import sys
import threading

import pytest
import torch

from epdctl.errors import PeerGone, RegistrationFailed, TransferError, UserError
from epdctl.transfer import cuda_ipc
from epdctl.transfer.cuda import open_cuda
from epdctl.transfer.cuda_ipc import BATCH_RUNS, CudaIpcMover
from epdctl.transfer.movers import Put
from epdctl.wire.transfer import PoolLocation
from tests.support.host_memory import HostMemory

CPU = torch.device("cpu")


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory()


@pytest.fixture
def mover(memory: HostMemory) -> CudaIpcMover:
    made = CudaIpcMover(memory, CPU)
    memory.batches.clear()
    return made


def test_pages_in_no_order_land_each_in_its_place_in_batches(memory: HostMemory, mover: CudaIpcMover) -> None:
    pages = list(range(3 * BATCH_RUNS + 1))
    random.Random(0).shuffle(pages)
    pool = mover.allocate(len(pages) * 16, CPU).zero_()
    data = torch.randint(0, 256, (len(pages), 16), dtype=torch.uint8)
    remote = mover.reach(mover.locate("kv", pool))
    remote.put([Put(data[at], page * 16) for at, page in enumerate(pages)], threading.Event())
    assert torch.equal(pool.view(-1, 16)[pages], data)
    assert max(memory.batches) == BATCH_RUNS
    assert sum(memory.batches) == len(pages)
    remote.close()
    assert not memory.opened


def test_a_writer_that_was_stopped_writes_nothing(mover: CudaIpcMover) -> None:
    pool = mover.allocate(64, CPU).zero_()
    remote = mover.reach(mover.locate("kv", pool))
    data, stop = torch.arange(1, 33, dtype=torch.uint8), threading.Event()
    remote.put([Put(data[:16], 16), Put(data[16:], 32)], stop)
    assert torch.equal(pool[16:48], data)
    stop.set()
    remote.put([Put(data, 0)], stop)
    assert torch.equal(pool[16:48], data)
    remote.close()


def test_memory_that_is_another_by_now_is_closed_and_refused(memory: HostMemory, mover: CudaIpcMover) -> None:
    location = mover.locate("kv", mover.allocate(64, CPU))
    other = mover.locate("kv", mover.allocate(64, CPU))
    handle, _, _ = location.place.partition("#")
    with pytest.raises(PeerGone, match="not the memory of the kv pool"):
        mover.reach(elsewhere(location, place=f"{handle}#{other.place.partition('#')[2]}"))
    memory.shared.clear()
    with pytest.raises(PeerGone, match="nobody shares this"):
        mover.reach(location)
    with pytest.raises(TransferError, match="not one of cuda-ipc's"):
        mover.reach(elsewhere(location, place="/proc/1/fd/3#beef"))
    assert not memory.opened


def elsewhere(location: PoolLocation, *, place: str) -> PoolLocation:
    return PoolLocation(pool=location.pool, place=place, base=location.base, nbytes=location.nbytes)


def test_copies_that_do_not_finish_are_an_error_of_ours(memory: HostMemory, mover: CudaIpcMover) -> None:
    pool = mover.allocate(64, CPU)
    remote = mover.reach(mover.locate("kv", pool))
    memory.broken = True
    with pytest.raises(TransferError, match="does not copy"):
        remote.put([Put(torch.ones(4, dtype=torch.uint8), 0)], threading.Event())
    remote.close()


def test_a_probe_believes_bytes_and_not_words(memory: HostMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def begin(self, _: object) -> None: ...

        def finish(self) -> None: ...

    monkeypatch.setattr(memory, "copies", Idle)
    with pytest.raises(UserError, match="had copied what it had not"):
        CudaIpcMover(memory, CPU)


def test_the_note_says_what_was_measured(mover: CudaIpcMover) -> None:
    assert mover.note.startswith("cuda-ipc, ")
    assert mover.note.endswith(" GB/s to itself")


def test_memory_that_cannot_be_shared_and_memory_of_others_are_no_pool(memory: HostMemory, mover: CudaIpcMover) -> None:
    with pytest.raises(RegistrationFailed, match="was not allocated by this transport"):
        mover.locate("kv", torch.empty(64, dtype=torch.uint8))
    with pytest.raises(RegistrationFailed, match="memory of cpu, not of meta"):
        mover.allocate(64, torch.device("meta"))
    memory.private = True
    with pytest.raises(UserError, match="nobody else's"):
        mover.allocate(64, CPU)
    with pytest.raises(UserError, match="nobody else's"):
        CudaIpcMover(memory, CPU)


def test_memory_that_a_predecessor_still_has_is_waited_for(
    memory: HostMemory, mover: CudaIpcMover, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = torch.empty, [True, True]

    def empty(*size: int, **how: object) -> torch.Tensor:
        if full:
            full.pop()
            raise torch.OutOfMemoryError("somebody else has it")
        return real(*size, **how)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(cuda_ipc, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(torch, "empty", empty)
    assert mover.allocate(64, CPU).numel() == 64
    full += [True]
    memory.left = 1 << 20
    with pytest.raises(torch.OutOfMemoryError):  # it is there, and beyond what this rank may have
        mover.allocate(64, CPU)
    memory.left = 0
    full += [True]
    monkeypatch.setattr(cuda_ipc, "MEMORY_SECONDS", 0)
    with pytest.raises(torch.OutOfMemoryError):
        mover.allocate(64, CPU)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="memory of GPUs, not of cpu"):
        open_cuda(CPU)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(UserError, match=r"needs the module cuda\.bindings"):
            open_cuda(torch.device("cuda:0"))
