"""The GPUs and cores that may be planned with. Reading the driver is one function; what it means is pure.

The outer CUDA_VISIBLE_DEVICES is the universe, by CUDA's own rules: an unknown entry ends the list, and so does -1.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epdctl.errors import PlacementError
from epdctl.ids import PhysicalGpu

__all__ = [
    "MOONCAKE_PACKAGES",
    "Gpu",
    "Hardware",
    "installed_mooncake",
    "probe",
    "read_gpus",
    "usable_cores",
    "visible",
]

MOONCAKE_PACKAGES = (
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-non-cuda",
)
_END = ("", "-1")  # entries of CUDA_VISIBLE_DEVICES that end the list


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or one MIG slice of a GPU. A slice has its parent's index: only its UUID names it."""

    physical: PhysicalGpu
    name: str
    memory_bytes: int
    mig_parent: str | None = None  # UUID of the GPU that this is a slice of

    @property
    def uuid(self) -> str:
        return self.physical.uuid

    @property
    def index(self) -> int:
        return self.physical.index

    def __str__(self) -> str:
        return self.uuid if self.mig_parent else f"{self.index}"


@dataclass(frozen=True, slots=True)
class Hardware:
    gpus: tuple[Gpu, ...]
    cores: int
    notes: tuple[str, ...] = ()  # what a person should know about how this was found
    mooncake: str | None = None  # the package of it that is installed
    apart: frozenset[frozenset[str]] = frozenset()  # pairs of UUIDs of GPUs that cannot reach each other's memory
    cuda_bindings: bool = True  # what ranks call CUDA by is installed


def probe(environ: Mapping[str, str]) -> Hardware:
    """What this machine has, as ``environ`` lets us see it. Raises PlacementError when the driver is there but sick."""
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    nothing = wanted is not None and wanted.partition(",")[0].strip() in _END  # then a sick driver does not matter
    found, apart = ((), frozenset[frozenset[str]]()) if nothing else read_gpus()
    gpus, notes = visible(found, wanted)
    return Hardware(gpus, usable_cores(), notes, installed_mooncake(), apart, _has_cuda_bindings())


def visible(gpus: Sequence[Gpu], wanted: str | None) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order, and notes. ``None``: not set, so all of them."""
    if wanted is None:
        return tuple(gpus), ()
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry in _END:
            break
        found = [gpu for gpu in _named(gpus, entry) if gpu not in chosen]
        if not found:
            note = (
                f"CUDA_VISIBLE_DEVICES={wanted}: no further GPU {entry!r} here, so the list ends before it, as in CUDA"
            )
            return tuple(chosen), (note,)
        chosen.extend(found)
    return tuple(chosen), ()


def read_gpus() -> tuple[tuple[Gpu, ...], frozenset[frozenset[str]]]:
    """Every GPU of the machine in PCI order, a MIG one as its slices, and which cannot reach each other's memory; none
    without a driver.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return (), frozenset()
    except pynvml.NVMLError as error:
        raise _sick(error) from error
    try:
        with _translated():
            count = pynvml.nvmlDeviceGetCount()
            return tuple(gpu for index in range(count) for gpu in _read(index)), frozenset(_apart(count))
    finally:
        with _translated():
            pynvml.nvmlShutdown()


def usable_cores() -> int:
    """Cores this process may run on, less what its container's CPU quota takes away."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # no cgroup v2: no quota
        return max(1, min(cores, _quota(Path("/sys/fs/cgroup/cpu.max").read_text(), cores)))
    return cores


def installed_mooncake() -> str | None:
    """Which of the packages with that one import name is here; the first, if several were installed over each other."""
    for package in MOONCAKE_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            return package
    return None


def _has_cuda_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _quota(text: str, cores: int) -> int:
    """``cpu.max`` says "max 100000", or "150000 100000" for one and a half cores."""
    limit, _, period = text.strip().partition(" ")
    return cores if limit == "max" else int(limit) // int(period or 100_000)


def _named(gpus: Sequence[Gpu], entry: str) -> list[Gpu]:
    """One entry's GPUs: an index (a split GPU gives all its slices), or a beginning that fits one UUID only."""
    if entry.isdecimal():
        return [gpu for gpu in gpus if gpu.index == int(entry)]
    if not entry.startswith(("GPU-", "MIG-")):
        return []
    found = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
    whole = [gpu for gpu in gpus if gpu.mig_parent and gpu.mig_parent.startswith(entry)]
    return found if len(found) == 1 else whole if len({gpu.mig_parent for gpu in whole}) == 1 else []


def _read(index: int) -> Iterator[Gpu]:
    import pynvml

    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    slices = _slices(device)
    if not slices:
        yield _gpu(index, device, None)
    parent = _text(pynvml.nvmlDeviceGetUUID(device))
    for part in slices:
        yield _gpu(index, part, parent)


def _apart(count: int) -> Iterator[frozenset[str]]:
    """Where the driver says so; what it cannot say is found out by whoever tries."""
    import pynvml

    devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    for one, other in itertools.permutations(devices, 2):
        with contextlib.suppress(pynvml.NVMLError):
            if pynvml.nvmlDeviceGetP2PStatus(one, other, pynvml.NVML_P2P_CAPS_INDEX_WRITE) != pynvml.NVML_P2P_STATUS_OK:
                yield frozenset(_text(pynvml.nvmlDeviceGetUUID(device)) for device in (one, other))


def _gpu(index: int, device: Any, mig_parent: str | None) -> Gpu:
    import pynvml

    uuid = _text(pynvml.nvmlDeviceGetUUID(device))
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(device).total)
    return Gpu(PhysicalGpu(index, uuid), _text(pynvml.nvmlDeviceGetName(device)), memory, mig_parent)


def _slices(device: Any) -> list[Any]:
    """Handles of the MIG slices of a GPU in MIG mode; none for any other."""
    import pynvml

    try:
        mode, _ = pynvml.nvmlDeviceGetMigMode(device)
    except pynvml.NVMLError_NotSupported:
        return []
    if mode != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []
    slices = []
    for position in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        with contextlib.suppress(pynvml.NVMLError_NotFound):  # a slot without a slice
            slices.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, position))
    return slices


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    import pynvml

    try:
        yield
    except pynvml.NVMLError as error:
        raise _sick(error) from error


def _sick(error: Exception) -> PlacementError:
    hint = "see whether nvidia-smi works; to plan without GPUs, set CUDA_VISIBLE_DEVICES to nothing"
    return PlacementError(f"the GPUs cannot be read: {error}", hint=hint)
