"""The end of a process is seen once, of that process alone, and by nobody who is still being made."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from epdctl.transfer import deaths
from epdctl.transfer.deaths import DeathWatch, birth
from tests.support.ranks import run


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture(params=["pidfd", "poll"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "poll":

        def missing(_: int) -> int:
            raise OSError(errno.ENOSYS, "this kernel has none")

        monkeypatch.setattr(os, "pidfd_open", missing)
        monkeypatch.setattr(deaths, "POLL_SECONDS", 0.001)


@pytest.mark.usefixtures("_kernel")
def test_a_death_is_told_once(child: subprocess.Popen[bytes]) -> None:
    async def work() -> None:
        told = asyncio.Event()
        times: list[int] = []

        def died() -> None:
            times.append(1)
            told.set()

        watch = DeathWatch(child.pid, birth(child.pid), died)
        child.kill()
        child.wait()
        assert not times
        await told.wait()
        watch.close()
        assert times == [1]

    run(work())


@pytest.mark.usefixtures("_kernel")
def test_another_process_with_its_number_is_not_it(child: subprocess.Popen[bytes]) -> None:
    async def work() -> None:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ProcessLookupError):
            DeathWatch(child.pid, birth(child.pid) - 1, lambda: None)
        assert os.listdir("/proc/self/fd") == before
        child.kill()
        child.wait()
        told: list[int] = []
        with pytest.raises(ProcessLookupError):
            DeathWatch(child.pid, 1, lambda: told.append(1))
        await asyncio.sleep(0)
        assert not told

    run(work())
