"""A rank keeps within the memory that the plan gives it, before it takes any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from epdctl.ids import LocalGpu
from epdctl.rank.device import keep_within, prepare_device
from epdctl.wire.config import RankConfig
from tests.support.ranks import make_spec

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """A GPU of 100 bytes."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []

    def get_device_properties(self, device: torch.device, /) -> SimpleNamespace:
        return SimpleNamespace(total_memory=100)

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device, /) -> None:
        self.asked.append(("fraction", fraction))

    def set_device(self, device: torch.device, /) -> None:
        self.asked.append(("device", device))


@pytest.mark.parametrize(("memory", "asked"), [(0, []), (25, [("fraction", 0.25)]), (300, [("fraction", 1.0)])])
def test_a_share_becomes_a_fraction(memory: int, asked: list[tuple[str, float]]) -> None:
    cuda = FakeCuda()
    keep_within(cuda, DEVICE, memory)
    assert cuda.asked == asked


def config(**changes: object) -> RankConfig:
    return msgspec.structs.replace(make_spec("decode/0", Path("/nowhere")).config, **changes)


def test_a_rank_is_bounded_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    assert prepare_device(config(devices=[LocalGpu(0)], memory_bytes=40)) == DEVICE
    assert cuda.asked == [("device", DEVICE), ("fraction", 0.4)]


def test_a_rank_without_a_gpu_asks_nothing_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", None)
    assert prepare_device(config(memory_bytes=40)) == torch.device("cpu")
