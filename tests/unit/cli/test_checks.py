"""What ``doctor`` makes of facts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from epdctl.cli import checks, examine
from epdctl.cli.checks import Check, Level, Mooncake
from epdctl.transfer.rdma import RdmaDevices

CPU_PACKAGE = "mooncake-transfer-engine-non-cuda"


@pytest.mark.parametrize(
    ("torch", "driver", "extra"),
    [
        ("2.13.0+cpu", None, "mooncake-cpu"),
        ("2.13.0+cu130", None, "mooncake-cpu"),  # no GPU here, whatever torch was built for
        ("2.13.0+cu130", 13000, "mooncake-cuda13"),
        ("2.13.0+cu129", 13000, "mooncake-cuda12"),  # the runtime that torch brings decides, not the driver
        ("2.13.0", 12040, "mooncake-cuda12"),
        (None, 13010, "mooncake-cuda13"),
    ],
)
def test_which_mooncake_fits(torch: str | None, driver: int | None, extra: str) -> None:
    assert checks.fitting_extra(torch, driver) == extra


@pytest.mark.parametrize(
    ("found", "level", "said"),
    [
        (Mooncake([]), Level.OK, "pip install 'epdctl[mooncake-cpu]'"),
        (Mooncake([CPU_PACKAGE]), Level.OK, "can be read and written by every user of this host"),
        (Mooncake([CPU_PACKAGE], private=False), Level.WARN, "a firewall"),
        (Mooncake(["mooncake-transfer-engine"]), Level.FAIL, "pip uninstall -y mooncake-transfer-engine"),
        (Mooncake([CPU_PACKAGE, "mooncake-transfer-engine"]), Level.FAIL, "all of them write the same module"),
        (Mooncake([CPU_PACKAGE], "libibverbs.so.1: cannot open"), Level.FAIL, "apt-get install libibverbs1"),
        (Mooncake([CPU_PACKAGE], "segmentation fault"), Level.FAIL, "pip uninstall"),
    ],
)
def test_mooncake_is_one_package_that_imports(found: Mooncake, level: Level, said: str) -> None:
    check = checks.check_mooncake(found, "mooncake-cpu", CPU_PACKAGE)
    assert check.level is level
    assert said in f"{check.finding} {check.remedy}"


@pytest.mark.parametrize(
    ("check", "level"),
    [
        (checks.check_python((3, 10)), Level.FAIL),
        (checks.check_python((3, 11)), Level.OK),
        (checks.check_python((3, 14)), Level.FAIL),
        (checks.check_package("torch", None, (2, 11)), Level.FAIL),
        (checks.check_package("torch", "2.9.1+cpu", (2, 11)), Level.FAIL),
        (checks.check_package("torch", "2.11.0+cpu", (2, 11)), Level.OK),
        (checks.check_package("torch", "10.0", (2, 11)), Level.OK),
        (checks.check_gpus([], None), Level.OK),
        (checks.check_gpus([], "driver/library version mismatch"), Level.FAIL),
        (checks.check_cuda_ipc(None), Level.OK),
        (checks.check_cuda_ipc("No module named 'cuda'"), Level.FAIL),
        (checks.check_kernel("pidfd", False, "slow"), Level.WARN),
        (checks.check_memlock(64 << 10, has_rdma=True), Level.WARN),
        (checks.check_memlock(64 << 10, has_rdma=False), Level.OK),
        (checks.check_memlock(None, has_rdma=True), Level.OK),
        (checks.check_rdma(RdmaDevices()), Level.OK),
        (checks.check_rdma(RdmaDevices(("mlx5_0",))), Level.WARN),
        (checks.check_rdma(RdmaDevices(("mlx5_0",), ("uverbs0",))), Level.OK),
        (checks.check_open_files(256), Level.FAIL),
        (checks.check_open_files(1024), Level.WARN),
        (checks.check_open_files(65536), Level.OK),
        (checks.check_runtime_dir("/tmp/e", None, mine=True), Level.OK),
        (checks.check_runtime_dir("/tmp/e", 0o700, mine=True), Level.OK),
        (checks.check_runtime_dir("/tmp/e", 0o755, mine=True), Level.FAIL),
        (checks.check_runtime_dir("/tmp/e", 0o700, mine=False), Level.FAIL),
        (checks.check_runtime_dir("/" + "x" * 90, 0o700, mine=True), Level.FAIL),
        (checks.check_state_dir("/s", writable=True, free=9 << 30), Level.OK),
        (checks.check_state_dir("/s", writable=True, free=1 << 30), Level.WARN),
        (checks.check_state_dir("/s", writable=False, free=9 << 30), Level.FAIL),
        (checks.check_port(8000, "in use by nginx (pid 7)"), Level.WARN),
        (checks.check_port(8000, None), Level.OK),
    ],
)
def test_levels_and_a_remedy_for_whatever_is_not_well(check: Check, level: Level) -> None:
    assert check.level is level
    assert (check.remedy is None) == (level is Level.OK)


def test_what_videos_need_is_named_and_nothing_to_be_mended() -> None:
    assert checks.check_video([], "pip install x").level is Level.OK
    found = checks.check_video(["torchvision", "av"], "pip install x")
    assert (found.level, found.finding) == (
        Level.NOTE,
        "not served: torchvision and av not installed; only videos need it",
    )
    assert found.remedy == "pip install x"


def test_a_state_directory_that_is_not_there_yet_is_where_it_will_be_made(tmp_path: Path) -> None:
    found = examine._state_dir(tmp_path / "a" / "b")
    assert found.finding.startswith(f"{tmp_path}/a/b, ")
    (tmp_path / "file").touch()
    assert examine._state_dir(tmp_path / "file" / "b").level is Level.FAIL


def test_shared_memory_needs_memfds_and_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/shm may be missing or small: pools are not there."""
    assert [check.subject for check in examine._kernel()] == ["pidfd", "subreaper", "memfd"]

    def forbid(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", forbid)
    *_, memfd = examine._kernel()
    assert memfd == Check(
        Level.WARN,
        "memfd",
        "not available: ranks on CPUs need transfer.backend: zmq",
        "leave the sandbox, or use a newer kernel",
    )
