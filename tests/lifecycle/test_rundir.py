"""Claiming a run directory, against strangers, the dead, and each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from epdctl.control.paths import ClusterDir, Holder, RunState
from epdctl.errors import AlreadyRunning, UserError
from epdctl.ids import RankName, RunId
from epdctl.supervisor.rundir import LONGEST_SOCKET_PATH, RunDir, claim

RANKS = [RankName("encoder-router/0")]


def nothing(run: RunId) -> None:
    raise AssertionError(f"nothing died, so {run} needs no sweep")


def take(place: dict[str, str], run: str = "new", sweep: Callable[[RunId], None] = nothing) -> RunDir:
    return claim(RunState(Path(place["EPDCTL_STATE_DIR"]) / "c" / run), "c", place, sweep, RANKS)


def test_one_at_a_time_and_the_next_one_after_release(place: dict[str, str]) -> None:
    first = take(place)
    with pytest.raises(AlreadyRunning, match=str(os.getpid())):
        take(place, "second")
    first.release()
    assert not first.directory.path.exists()
    take(place, "third").release()


def test_what_a_dead_daemon_left_is_swept_before_anything_is_written(place: dict[str, str]) -> None:
    directory = ClusterDir(Path(place["EPDCTL_RUNTIME_DIR"]) / "c")
    (directory.path / "s").mkdir(parents=True)
    for left in (directory.control, directory.record, directory.sockets / "decode-0.1.inbox"):
        left.touch()
    directory.lock.write_bytes(msgspec.json.encode(Holder(pid=os.getpid(), start_time=1, run=RunId("old"))))
    swept: list[RunId] = []

    def sweep(run: RunId) -> None:
        holder = directory.holder()
        assert holder is not None
        assert holder.run == "old", "a daemon killed during the sweep must leave the trace to the next one"
        swept.append(run)

    claimed = take(place, sweep=sweep)
    assert swept == ["old"]
    assert sorted(os.listdir(directory.path)) == ["lock", "s"]
    assert os.listdir(directory.sockets) == []
    holder = directory.holder()
    assert holder is not None
    assert (holder.run, holder.alive) == ("new", True)
    claimed.release()


def test_a_directory_that_others_can_enter_is_refused(place: dict[str, str]) -> None:
    base = Path(place["EPDCTL_RUNTIME_DIR"])
    base.chmod(0o755)
    with pytest.raises(UserError, match="0700"):
        take(place)
    base.chmod(0o700)
    link = base.parent / "link"
    link.symlink_to(base)
    with pytest.raises(UserError, match="of your own"):
        take({**place, "EPDCTL_RUNTIME_DIR": str(link)})


@pytest.mark.parametrize("over", [0, 1])
def test_the_longest_endpoint_must_fit_into_a_socket_address(place: dict[str, str], over: int) -> None:
    ending = len("/c/s/encoder-router-0.99999.purpose-16-bytes")
    base = place["EPDCTL_RUNTIME_DIR"]
    long = {**place, "EPDCTL_RUNTIME_DIR": f"{base}/{'x' * (LONGEST_SOCKET_PATH - ending - len(base) - 1 + over)}"}
    if over:
        with pytest.raises(UserError, match="108 bytes"):
            take(long)
    else:
        take(long).release()
