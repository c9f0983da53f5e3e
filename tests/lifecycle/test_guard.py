"""The guard alone, as a real process: whatever happens, nothing of the rank's tree is left."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.report import HANG, Report

GUARD = Path(__file__).parents[2] / "epdctl" / "supervisor" / "guard.py"


class Keeper:
    """A guard, and the owner's end of its lifeline."""

    def __init__(self, command: list[str], *, grace: float = 30.0, prelude: tuple[str, ...] = (str(GUARD),)) -> None:
        self.lifeline, theirs = socket.socketpair()
        self.lifeline.settimeout(HANG)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", *prelude, str(theirs.fileno()), str(grace), *command],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._lines = self.lifeline.makefile("r")

    def heard(self) -> str:
        return self._lines.readline().rstrip("\n")

    def ended(self) -> int:
        """The guard's own exit status, once it has ended."""
        return self.process.wait(HANG)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def hang_up(self) -> None:
        self._lines.close()
        self.lifeline.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.lifeline.sendall(b"kill\n")
        self.hang_up()
        self.process.wait(HANG)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Report]:
    with Report(tmp_path) as report:
        yield report


@pytest.fixture
def keep() -> Iterator[type[Keeper]]:
    kept: list[Keeper] = []

    class Kept(Keeper):
        def __init__(self, command: list[str], **options: object) -> None:
            super().__init__(command, **options)  # type: ignore[arg-type]
            kept.append(self)

    yield Kept
    for keeper in kept:
        keeper.close()


def test_the_exit_status_is_passed_on(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child("--exit", "3"))
    assert guard.heard() == f"spawned {report.wait_for(1)['rank']}"
    assert guard.heard() == "exited 3"
    assert guard.ended() == 0
    assert guard.errors() == ""


def test_a_killed_rank_is_told_by_its_signal(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child())
    os.kill(report.wait_for(1)["rank"], signal.SIGKILL)
    guard.heard()
    assert guard.heard() == "exited -9"


def test_a_command_that_cannot_run_is_told_with_its_name(keep: type[Keeper]) -> None:
    guard = keep(["/nowhere/rank"])
    assert guard.heard() == "failed /nowhere/rank: No such file or directory"
    assert guard.heard() == ""
    assert guard.ended() == 0


def test_grandchildren_in_sessions_of_their_own_go_with_the_rank(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child("--setsid-grandchild", "--setsid-grandchild", "--ignore-term", "--exit", "5"))
    report.wait_for(3)
    report.wait_end()
    guard.heard()
    assert guard.heard() == "exited 5"


def test_they_are_gone_before_the_end_is_told(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child("--setsid-grandchild", "--setsid-grandchild", "--exit", "0"))
    pids = report.wait_for(3).values()
    guard.heard()
    assert guard.heard() == "exited 0"
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_kill_ends_the_whole_tree_at_once(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child("--setsid-grandchild", "--setsid-grandchild", "--ignore-term"))
    report.wait_for(3)
    guard.lifeline.sendall(b"kill\n")
    report.wait_end()
    guard.heard()
    assert guard.heard() == "exited -9"


def test_term_reaches_the_rank_only(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child())
    report.wait_for(1)
    guard.lifeline.sendall(b"term\n")
    guard.heard()
    assert guard.heard() == "exited -15"


def test_term_is_not_followed_by_a_kill(keep: type[Keeper], report: Report) -> None:
    """When to lose patience is the daemon's decision: the grace is for a lost owner."""
    guard = keep(report.child("--ignore-term"), grace=0.0)
    rank = report.wait_for(1)["rank"]
    guard.lifeline.sendall(b"term\nhello\n")
    assert guard.process.stderr is not None
    assert guard.process.stderr.readline() == b"guard: not understood and ignored: b'hello'\n"  # so term was heard
    os.kill(rank, 0)


@pytest.mark.parametrize("stubborn", [(), ("--ignore-term",)])
def test_a_lost_owner_ends_everything(keep: type[Keeper], report: Report, stubborn: tuple[str, ...]) -> None:
    guard = keep(report.child("--setsid-grandchild", "--setsid-grandchild", *stubborn), grace=0.05)
    report.wait_for(3)
    guard.hang_up()
    report.wait_end()
    assert guard.ended() == 0


def test_a_rank_that_leaves_within_the_grace_is_not_waited_for_longer(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child("--setsid-grandchild"), grace=100 * HANG)
    report.wait_for(2)
    guard.hang_up()
    report.wait_end()
    assert guard.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_ends_everything(keep: type[Keeper], report: Report, number: signal.Signals) -> None:
    guard = keep(report.child("--setsid-grandchild", "--ignore-term"), grace=0.05)
    report.wait_for(2)
    guard.process.send_signal(number)
    report.wait_end()
    guard.heard()
    assert guard.heard() == "exited -9"
    assert guard.ended() == 0


def test_the_rank_dies_with_a_killed_guard(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child("--ignore-term"))
    report.wait_for(1)
    guard.process.kill()
    report.wait_end()


def test_a_daemonised_process_that_ends_early_leaves_no_zombie(keep: type[Keeper], report: Report) -> None:
    guard = keep(report.child("--setsid-grandchild", "--setsid-grandchild"))
    orphan, parent = (report.wait_for(3)[role] for role in ("level-1", "level-2"))
    orphan_end, parent_end = os.pidfd_open(orphan), os.pidfd_open(parent)
    os.kill(parent, signal.SIGKILL)  # level-1 now belongs to the guard; its dead parent to the rank, which never reaps
    assert select.select([parent_end], [], [], HANG)[0]
    os.kill(orphan, signal.SIGKILL)
    assert select.select([orphan_end], [], [], HANG)[0]
    assert guard.process.stderr is not None
    for _ in range(2):  # the second answer comes after a whole round of the guard's loop
        guard.lifeline.sendall(b"anything\n")
        guard.process.stderr.readline()
    os.close(orphan_end)
    os.close(parent_end)
    assert not Path(f"/proc/{orphan}").exists()


def test_without_prctl_it_says_so_and_works_on(keep: type[Keeper], report: Report) -> None:
    blind = f"import runpy, sys; sys.modules['ctypes'] = None; runpy.run_path({str(GUARD)!r}, run_name='__main__')"
    guard = keep(report.child("--exit", "4"), prelude=("-c", blind))
    guard.heard()
    assert guard.heard() == "exited 4"
    assert "this system has no subreaper" in guard.errors()


def test_the_guard_imports_nothing_of_the_project(tmp_path: Path) -> None:
    lonely = tmp_path / "guard.py"
    lonely.write_bytes(GUARD.read_bytes())
    code = f"import runpy, sys; runpy.run_path({str(lonely)!r}, run_name='guard'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, check=True, text=True)
    assert not {name for name in loaded.stdout.split() if name.partition(".")[0] in {"epdctl", "ctypes", "asyncio"}}
