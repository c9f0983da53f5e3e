"""Which GPUs an outer CUDA_VISIBLE_DEVICES leaves, and how the driver is read."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest

from epdctl.errors import PlacementError
from epdctl.topology import hardware
from epdctl.topology.hardware import probe, read_gpus, visible
from tests.unit.topology.support import UUIDS, gpu

WHOLE = [gpu(index) for index in range(4)]
TWINS = [gpu(0, "GPU-aaaa1111"), gpu(1, "GPU-aaaa2222")]
SPLIT = [gpu(0), gpu(1, "MIG-1111", mig_parent="GPU-big1"), gpu(1, "MIG-2222", mig_parent="GPU-big1"), gpu(2)]


@pytest.mark.parametrize(
    ("gpus", "wanted", "chosen"),
    [
        (WHOLE, None, [0, 1, 2, 3]),
        (WHOLE, "", []),
        (WHOLE, " ", []),
        (WHOLE, "-1", []),
        (WHOLE, "2", [2]),
        (WHOLE, "3,1", [3, 1]),
        (WHOLE, " 3 , 1 ", [3, 1]),
        (WHOLE, "1,-1,2", [1]),
        (WHOLE, "1,,2", [1]),
        (WHOLE, UUIDS[2], [2]),
        (WHOLE, "GPU-3333", [3]),
        (WHOLE, f"{UUIDS[1]},0", [1, 0]),
        (TWINS, "GPU-aaaa2", [1]),
        (SPLIT, "MIG-2222", [2]),
        (SPLIT, "MIG-2,0", [2, 0]),
        (SPLIT, "1", [1, 2]),
        (SPLIT, "GPU-big1,2", [1, 2, 3]),
    ],
)
def test_what_is_visible(gpus: list[hardware.Gpu], wanted: str | None, chosen: list[int]) -> None:
    assert visible(gpus, wanted) == (tuple(gpus[index] for index in chosen), ())


@pytest.mark.parametrize(
    ("gpus", "wanted", "chosen", "unknown"),
    [
        (WHOLE, "0,9,1", [0], "'9'"),
        (WHOLE, "cuda:0", [], "'cuda:0'"),
        (WHOLE, "0,GPU-9999", [0], "'GPU-9999'"),
        (WHOLE, "1,2,1", [1, 2], "'1'"),
        (TWINS, "GPU-aaaa", [], "'GPU-aaaa'"),
        (WHOLE, "-2", [], "'-2'"),
    ],
)
def test_an_unknown_entry_ends_the_list_and_says_so(
    gpus: list[hardware.Gpu], wanted: str, chosen: list[int], unknown: str
) -> None:
    found, notes = visible(gpus, wanted)
    assert found == tuple(gpus[index] for index in chosen)
    (note,) = notes
    assert unknown in note
    assert wanted in note


class Driver:
    """NVML's functions, over a table: device → its MIG slices, or None for a GPU that knows no MIG."""

    def __init__(self, devices: dict[str, list[str] | None]) -> None:
        self.devices = devices
        self.apart: set[tuple[str, str]] = set()
        self.open = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in dir(self):
            if name.startswith("nvml"):
                monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.devices)[index]

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return type("Memory", (), {"total": 100})()

    def nvmlDeviceGetP2PStatus(self, one: str, other: str, what: int) -> int:
        assert what == 1, "to write"
        if self.devices[one]:
            raise pynvml.NVMLError_Unknown()
        return 1 if (one, other) in self.apart else 0

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        slices = self.devices[handle]
        if slices is None:
            raise pynvml.NVMLError_NotSupported()
        return (1 if slices else 0), 0

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, position: int) -> str:
        slices = self.devices[handle] or []
        if position >= len(slices):
            raise pynvml.NVMLError_NotFound()
        return slices[position]


def test_reading_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver({"GPU-a": None, "GPU-b": ["MIG-1", "MIG-2"], "GPU-c": []})
    driver.install(monkeypatch)
    driver.apart = {("GPU-c", "GPU-a")}
    gpus, apart = read_gpus()
    found = [(one.index, one.uuid, one.mig_parent) for one in gpus]
    assert found == [(0, "GPU-a", None), (1, "MIG-1", "GPU-b"), (1, "MIG-2", "GPU-b"), (2, "GPU-c", None)]
    assert {(one.name, one.memory_bytes) for one in gpus} == {("NVIDIA H200", 100)}
    assert apart == {frozenset({"GPU-a", "GPU-c"})}
    assert driver.open == 0


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded])
def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def refuse() -> None:
        raise error()

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert read_gpus() == ((), frozenset())


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
def test_a_sick_driver_is_one_error_of_ours(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    driver = Driver({"GPU-a": None})
    driver.install(monkeypatch)

    def fail(*arguments: object) -> None:
        raise pynvml.NVMLError_Unknown()

    monkeypatch.setattr(pynvml, call, fail)
    with pytest.raises(PlacementError, match="the GPUs cannot be read") as caught:
        probe({})
    assert "CUDA_VISIBLE_DEVICES" in str(caught.value.hint)
    assert driver.open == 0
    assert probe({"CUDA_VISIBLE_DEVICES": ""}).gpus == ()


def test_probe_reads_the_given_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver({"GPU-a": None, "GPU-b": None}).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [one.uuid for one in probe({"CUDA_VISIBLE_DEVICES": "1"}).gpus] == ["GPU-b"]
    assert len(probe({}).gpus) == 2
    assert probe({}).cores >= 1


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", 8), ("150000 100000\n", 1), ("400000 100000", 4), ("50000 100000", 0)]
)
def test_a_container_s_quota(text: str, cores: int) -> None:
    assert hardware._quota(text, 8) == cores
