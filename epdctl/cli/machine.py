"""Versions and devices of this machine, from package metadata and NVML; imports none of the packages it names."""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import pynvml

from epdctl.topology.hardware import installed_mooncake

__all__ = ["cuda_driver", "gpu_names", "installed", "versions"]

T = TypeVar("T")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_driver() -> int | None:
    """The newest CUDA that the driver runs, 12040 for 12.4; None without a driver."""
    return _ask_driver(lambda: int(pynvml.nvmlSystemGetCudaDriverVersion_v2()))


def driver_version() -> str | None:
    return _ask_driver(lambda: str(pynvml.nvmlSystemGetDriverVersion()))


def gpu_names() -> tuple[list[str], str | None]:
    """``0: NVIDIA H200, 139 GiB`` for each GPU, and why they cannot be asked though there is a driver."""
    try:
        with _nvml():
            return [_gpu_name(index) for index in range(pynvml.nvmlDeviceGetCount())], None
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return [], None
    except pynvml.NVMLError as error:
        return [], str(error)


def versions() -> dict[str, str | None]:
    """By name; None for what is not there."""
    mooncake = installed_mooncake()
    return {
        "epdctl": installed("epdctl"),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "transformers": installed("transformers"),
        "mooncake": f"{mooncake} {installed(mooncake)}" if mooncake else None,
        "nvidia driver": driver_version(),
    }


@contextmanager
def _nvml() -> Generator[None]:
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _ask_driver(question: Callable[[], T]) -> T | None:
    try:
        with _nvml():
            return question()
    except pynvml.NVMLError:
        return None


def _gpu_name(index: int) -> str:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / (1 << 30)
    return f"{index}: {pynvml.nvmlDeviceGetName(handle)}, {memory:.0f} GiB"
