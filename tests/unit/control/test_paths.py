"""Names, directories and who holds them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from epdctl.control.paths import (
    ClusterDir,
    Holder,
    process_start,
    runs_of,
    runtime_base,
    state_base,
)
from epdctl.errors import UserError
from epdctl.ids import RunId
from epdctl.topology.names import check_name


def test_the_runtime_directory_is_chosen_the_session_s_or_a_private_one_in_tmp() -> None:
    chosen = {"EPDCTL_RUNTIME_DIR": "/run/mine", "XDG_RUNTIME_DIR": "/run/user/1"}
    assert runtime_base(chosen) == Path("/run/mine")
    assert runtime_base({"XDG_RUNTIME_DIR": "/run/user/1"}) == Path("/run/user/1/epdctl")
    assert runtime_base({}).name == f"epdctl-{os.getuid()}"


def test_the_state_directory_likewise() -> None:
    assert state_base({"EPDCTL_STATE_DIR": "/var/x", "XDG_STATE_HOME": "/s"}) == Path("/var/x")
    assert state_base({"XDG_STATE_HOME": "/s", "HOME": "/h"}) == Path("/s/epdctl")
    assert state_base({"HOME": "/h"}) == Path("/h/.local/state/epdctl")


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-x", "x" * 33, "a b", ".hidden"])
def test_a_name_that_is_not_one_plain_directory_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a cluster"):
        check_name(name)


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    child = subprocess.Popen(["sleep", "3600"])
    start = process_start(child.pid)
    assert start is not None
    assert Holder(pid=child.pid, start_time=start, run=RunId("r")).alive
    assert not Holder(pid=child.pid, start_time=start + 1, run=RunId("r")).alive
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None, "a zombie runs nothing"
    child.wait()
    assert process_start(child.pid) is None


def test_half_a_lock_file_means_that_nobody_holds_it(tmp_path: Path) -> None:
    directory = ClusterDir(tmp_path)
    assert directory.holder() is None
    whole = msgspec.json.encode(Holder(pid=os.getpid(), start_time=process_start(os.getpid()) or 0, run=RunId("r")))
    directory.lock.write_bytes(whole[:-5])
    assert not directory.running
    directory.lock.write_bytes(whole)
    assert directory.running


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for age, run in enumerate(("new", "old", "oldest")):
        (tmp_path / "c" / run).mkdir(parents=True)
        os.utime(tmp_path / "c" / run, (1000 - age, 1000 - age))
    found = runs_of("c", {"EPDCTL_STATE_DIR": str(tmp_path)})
    assert [state.run for state in found] == ["new", "old", "oldest"]
