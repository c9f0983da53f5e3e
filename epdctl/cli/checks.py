"""What ``doctor`` makes of the facts of a machine. Pure: facts in, findings with remedies out."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from epdctl.transfer.rdma import RdmaDevices

__all__ = [
    "Check",
    "Level",
    "Mooncake",
    "check_cuda_ipc",
    "check_gpus",
    "check_kernel",
    "check_memlock",
    "check_mooncake",
    "check_open_files",
    "check_package",
    "check_port",
    "check_python",
    "check_rdma",
    "check_runtime_dir",
    "check_state_dir",
    "check_video",
    "fitting_extra",
]

GIB = 1 << 30
_SMALL_DISK = 2 * GIB
_SOCKET_PATH_LIMIT = 107
_LONGEST_SOCKET = len("//s/encoder-router-0.99999.a-purpose-of-16b")  # without the cluster's name
_SHORTEST_NAME = 8
_NO_TOKEN = "its ports ask for no token, so what ranks with it move can be read and written by every user"
_OPEN_DEVICES = "in a container: docker run --device=/dev/infiniband; else the group of those files"
_DEBIAN_PACKAGES = {
    "libibverbs": "libibverbs1",
    "librdmacm": "librdmacm1",
    "libnuma": "libnuma1",
    "libcurl": "libcurl4",
    "libcudart": "the CUDA runtime (or the Mooncake package for this machine, above)",
}


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "fail"


class Check(msgspec.Struct, frozen=True):
    """One line of ``doctor``."""

    level: Level
    subject: str
    finding: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Mooncake:
    """What was found of it. ``broken``: the import error's text; None when it imports or is not installed.
    ``private``: this kernel lets us keep its ports on the loopback.
    """

    packages: Sequence[str]
    broken: str | None = None
    private: bool = True


def ok(subject: str, finding: str) -> Check:
    return Check(Level.OK, subject, finding)


def check_python(version: tuple[int, int]) -> Check:
    text = f"{version[0]}.{version[1]}"
    if (3, 11) <= version <= (3, 13):
        return ok("python", text)
    return Check(Level.FAIL, "python", text, "epdctl needs Python 3.11, 3.12 or 3.13")


def check_package(name: str, version: str | None, least: tuple[int, int]) -> Check:
    wanted = f"pip install '{name}>={least[0]}.{least[1]}'"
    if version is None:
        return Check(Level.FAIL, name, "not installed", wanted)
    return ok(name, version) if _numbers(version) >= least else Check(Level.FAIL, name, f"{version} is too old", wanted)


def _numbers(version: str) -> tuple[int, int]:
    parts = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return (parts[0], parts[1]) if len(parts) == 2 else (0, 0)


def fitting_extra(torch_version: str | None, cuda_driver: int | None) -> str:
    """The extra with the Mooncake wheel for this machine. ``cuda_driver``: 12040 for CUDA 12.4; None without a GPU.

    Mooncake links the CUDA runtime, so where there is a GPU the one that torch brings decides.
    """
    if cuda_driver is None:
        return "mooncake-cpu"
    build = (torch_version or "").partition("+cu")[2]
    major = int(build[:2]) if build[:2].isdigit() else cuda_driver // 1000
    return "mooncake-cuda13" if major >= 13 else "mooncake-cuda12"


def check_mooncake(found: Mooncake, extra: str, wanted_package: str) -> Check:
    line = f"pip install 'epdctl[{extra}]'"
    if not found.packages:
        return ok("mooncake", f"not installed; only transfer.backend: mooncake needs it: {line}")
    others = [package for package in found.packages if package != wanted_package]
    if others:
        text = f"{', '.join(found.packages)} installed; all of them write the same module, and this machine needs one"
        return Check(Level.FAIL, "mooncake", text, f"pip uninstall -y {' '.join(found.packages)} && {line}")
    if found.broken is not None:
        return Check(Level.FAIL, "mooncake", f"does not import: {found.broken}", _library_remedy(found.broken))
    if not found.private:
        text = f"{wanted_package} imports; {_NO_TOKEN} of whatever machine reaches this one: the kernel cannot tie them"
        return Check(Level.WARN, "mooncake", text, "Linux 5.7 or newer, or a firewall before the ports 15000 to 17000")
    return ok("mooncake", f"{wanted_package} imports; {_NO_TOKEN} of this host")


def check_video(missing: Sequence[str], extra: str) -> Check:
    """``missing``: of the packages that videos need."""
    if not missing:
        return ok("video", "can be served")
    return Check(Level.NOTE, "video", f"not served: {' and '.join(missing)} not installed; only videos need it", extra)


def _library_remedy(error: str) -> str:
    for library, package in _DEBIAN_PACKAGES.items():
        if library in error:
            return f"apt-get install {package}" if package.startswith("lib") else f"install {package}"
    return "install the library that the message names, or `pip uninstall` the package"


def check_gpus(names: Sequence[str], problem: str | None) -> Check:
    """``problem``: why the NVIDIA driver could not be asked though there is one."""
    if problem is not None:
        return Check(Level.FAIL, "gpus", f"the NVIDIA driver does not answer: {problem}", "nvidia-smi says more")
    return ok("gpus", "; ".join(names) if names else "none: ranks run on the CPU")


def check_cuda_ipc(broken: str | None) -> Check:
    """``broken``: why what a rank calls CUDA by does not import."""
    if broken is None:
        return ok("cuda-ipc", "cuda.bindings imports")
    text = f"cuda.bindings does not import: {broken}"
    return Check(Level.FAIL, "cuda-ipc", text, "pip install cuda-bindings, or write transfer.backend: zmq")


def check_kernel(feature: str, works: bool, consequence: str) -> Check:
    if works:
        return ok(feature, "works")
    return Check(Level.WARN, feature, f"not available: {consequence}", "leave the sandbox, or use a newer kernel")


def check_rdma(devices: RdmaDevices) -> Check:
    if not devices.listed:
        return ok("rdma", "no device; only protocol: rdma needs one")
    if devices.trouble is None:
        return ok("rdma", f"{', '.join(devices.listed)}, by way of {', '.join(devices.doors)}")
    return Check(Level.WARN, "rdma", f"{devices.trouble}; ranks with protocol: rdma will not start", _OPEN_DEVICES)


def check_memlock(limit: int | None, has_rdma: bool) -> Check:
    """``limit`` in bytes; None: unlimited. Only RDMA pins memory."""
    text = "unlimited" if limit is None else f"{limit / GIB:.2f} GiB"
    if limit is None or not has_rdma:
        return ok("memlock", text)
    return Check(Level.WARN, "memlock", f"{text}, and RDMA pins whole pools", "ulimit -l unlimited")


def check_open_files(limit: int) -> Check:
    if limit >= 4096:
        return ok("open files", str(limit))
    level = Level.WARN if limit >= 512 else Level.FAIL
    return Check(level, "open files", f"at most {limit}", "ulimit -n 65536")


def check_runtime_dir(path: str, mode: int | None, mine: bool) -> Check:
    """``mode``: permission bits; None when it is not there yet."""
    subject = "runtime dir"
    if len(path) + _LONGEST_SOCKET + _SHORTEST_NAME > _SOCKET_PATH_LIMIT:
        return Check(Level.FAIL, subject, f"{path} is too long for unix sockets", "EPDCTL_RUNTIME_DIR=/tmp/epdctl")
    if mode is None:
        return ok(subject, f"{path} (made by the first up)")
    if not mine:
        return Check(Level.FAIL, subject, f"{path} belongs to another user", "EPDCTL_RUNTIME_DIR names another")
    if mode & 0o077:
        return Check(Level.FAIL, subject, f"{path} is open to others ({mode:04o})", f"chmod 700 {path}")
    return ok(subject, path)


def check_state_dir(path: str, writable: bool, free: int) -> Check:
    """``free``: bytes where logs, events and recordings go."""
    subject = "state dir"
    if not writable:
        return Check(Level.FAIL, subject, f"{path} cannot be written", "EPDCTL_STATE_DIR names another")
    text = f"{path}, {free / GIB:.1f} GiB free"
    if free >= _SMALL_DISK:
        return ok(subject, text)
    return Check(Level.WARN, subject, f"{text}: logs and recordings may fill it", "EPDCTL_STATE_DIR names another")


def check_port(port: int, trouble: str | None, ours: str | None = None) -> Check:
    """``trouble``: what is with it when it is not free. ``ours``: the running cluster that listens there."""
    if ours is not None:
        return ok("port", f"{port} is in use by the cluster {ours}, which is up")
    if trouble is None:
        return ok("port", f"{port} is free")
    text = f"{port}, the gateway's default, is {trouble}"
    return Check(Level.WARN, "port", text, "gateway: {port: …} in the topology")
