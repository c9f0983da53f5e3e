"""Facts of this machine for ``doctor``. Imports nothing heavy: what must be imported is, in a process of its own."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from epdctl.cli import checks
from epdctl.cli.checks import Check
from epdctl.cli.machine import cuda_driver, gpu_names, installed
from epdctl.control.cluster import list_clusters
from epdctl.control.paths import runtime_base, state_base
from epdctl.families import videos
from epdctl.launch.procs import probe
from epdctl.topology.hardware import MOONCAKE_PACKAGES
from epdctl.topology.ports import why_not_free
from epdctl.transfer.loopback import can_keep
from epdctl.transfer.rdma import rdma_devices

__all__ = ["examine"]

_IMPORT_SECONDS = 60.0
_EXTRA_PACKAGES = {
    "mooncake-cpu": "mooncake-transfer-engine-non-cuda",
    "mooncake-cuda12": "mooncake-transfer-engine",
    "mooncake-cuda13": "mooncake-transfer-engine-cuda13",
}
DEFAULT_PORT = 8000


def examine(environ: Mapping[str, str]) -> Iterator[Check]:
    """Every check, one after the other, as its facts come in."""
    yield checks.check_python(sys.version_info[:2])
    yield checks.check_package("torch", installed("torch"), (2, 11))
    yield checks.check_package("transformers", installed("transformers"), (5, 17))
    yield _mooncake()
    yield checks.check_video(videos.missing(), _keeping_torch(videos.EXTRA))
    gpus, problem = gpu_names()
    yield checks.check_gpus(gpus, problem)
    if gpus:
        yield checks.check_cuda_ipc(_import_error("cuda.bindings.runtime"))
    yield from _kernel()
    rdma = rdma_devices()
    yield checks.check_rdma(rdma)
    yield checks.check_memlock(_limit(resource.RLIMIT_MEMLOCK), has_rdma=rdma.trouble is None)
    yield checks.check_open_files(_limit(resource.RLIMIT_NOFILE) or 1 << 30)
    yield _runtime_dir(runtime_base(environ))
    yield _state_dir(state_base(environ))
    yield _port(environ)


def _keeping_torch(line: str) -> str:
    """What is to be installed also asks for torch, and would bring another build of it."""
    torch = installed("torch")
    return line if torch is None else f"{line} torch=={torch}"


def _mooncake() -> Check:
    packages = [package for package in MOONCAKE_PACKAGES if installed(package)]
    extra = checks.fitting_extra(installed("torch"), cuda_driver())
    broken = _import_error("mooncake.engine") if packages else None
    return checks.check_mooncake(checks.Mooncake(packages, broken, can_keep()), extra, _EXTRA_PACKAGES[extra])


def _import_error(module: str) -> str | None:
    """The last line of what the import says; None when it works. In a process of its own: it may crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=_IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"the import hung for {_IMPORT_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"the import ended with status {done.returncode}"])[-1]


def _kernel() -> Iterator[Check]:
    found = probe()
    yield checks.check_kernel("pidfd", found.pidfd, "deaths are noticed a little later")
    yield checks.check_kernel("subreaper", found.subreaper, "what a killed rank started is found by the sweep only")
    yield checks.check_kernel("memfd", _memfd(), "ranks on CPUs need transfer.backend: zmq")


def _memfd() -> bool:
    """As ``transfer.backend: shm`` makes its pools; /dev/shm is not asked for, and its size bounds nothing."""
    try:
        os.close(os.memfd_create("epdctl-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError:
        return False
    return True


def _limit(kind: int) -> int | None:
    soft, _hard = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _runtime_dir(path: Path) -> Check:
    try:
        found = path.lstat()
    except OSError:
        return checks.check_runtime_dir(str(path), None, mine=True)
    return checks.check_runtime_dir(str(path), stat.S_IMODE(found.st_mode), mine=found.st_uid == os.getuid())


def _state_dir(path: Path) -> Check:
    """By the nearest directory that is there: the first ``up`` makes the rest."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return checks.check_state_dir(str(path), writable, shutil.disk_usage(there).free)


def _port(environ: Mapping[str, str]) -> Check:
    text = environ.get("EPDCTL_PORT", "")  # what the shipped profiles ask for
    port = int(text) if text.isdecimal() and 0 < int(text) < 65_536 else DEFAULT_PORT
    ours = next((found.name for found in list_clusters(environ) if port in found.record.ports), None)
    return checks.check_port(port, None if ours else why_not_free("127.0.0.1", port), ours)
