"""Pools in shared memory, as their writers find them by way of /proc: the right one, whole, or none at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from msgspec.structs import replace

from epdctl.errors import PeerGone
from epdctl.transfer import shm
from epdctl.transfer.movers import Put
from epdctl.transfer.shm import ShmMover
from epdctl.wire.transfer import PoolLocation

NBYTES = 10_000


@pytest.fixture
def mover() -> Iterator[ShmMover]:
    made = ShmMover()
    yield made
    made.close()


@pytest.fixture
def memory(mover: ShmMover) -> torch.Tensor:
    return mover.allocate(NBYTES, torch.device("cpu")).zero_()


@pytest.fixture
def location(mover: ShmMover, memory: torch.Tensor) -> PoolLocation:
    return mover.locate("kv", memory)


def other_mark(location: PoolLocation) -> PoolLocation:
    """As when the process has gone, and another one has its number, and memory of the same size at that descriptor."""
    path, _, mark = location.place.partition("#")
    return replace(location, place=f"{path}#{bytes(len(mark) // 2).hex()}")


def other_size(location: PoolLocation) -> PoolLocation:
    return replace(location, nbytes=location.nbytes + 1)


def other_file(location: PoolLocation) -> PoolLocation:
    return replace(location, place="/proc/self/exe-of-nobody#00")


@pytest.mark.parametrize("change", [other_mark, other_size, other_file])
def test_what_is_not_the_pool_is_not_mapped(
    mover: ShmMover, location: PoolLocation, change: Callable[[PoolLocation], PoolLocation]
) -> None:
    with pytest.raises(PeerGone):
        mover.reach(change(location))
    mover.reach(location).close()


def test_a_pool_whose_owner_closed_it_is_gone(mover: ShmMover, location: PoolLocation) -> None:
    mover.close()
    with pytest.raises(PeerGone):
        mover.reach(location)


def test_nobody_can_cut_a_pool_under_those_who_map_it(location: PoolLocation) -> None:
    path = location.place.partition("#")[0]
    for nbytes in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.truncate(path, nbytes)


def test_a_writer_that_was_told_to_stop_goes_on_to_no_further_stride(
    mover: ShmMover, memory: torch.Tensor, location: PoolLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "STRIDE_BYTES", 100)
    remote, stop = mover.reach(location), threading.Event()
    real = remote._copier.copy

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        real(target, source)
        stop.set()

    monkeypatch.setattr(remote._copier, "copy", copy)
    remote.put([Put(torch.ones(1000, dtype=torch.uint8), 50)], stop)
    assert memory.nonzero().flatten().tolist() == list(range(50, 150))
