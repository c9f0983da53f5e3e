"""The local launcher with real guards: whichever process is killed, the rest goes too, and nothing is leaked."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import pytest

from epdctl.ids import RunId, new_run_id
from epdctl.launch import procs
from epdctl.launch.base import Command, Exit
from epdctl.launch.local import MAX_SPEC_BYTES, LocalHandle, LocalLauncher
from epdctl.supervisor.sweep import find, sweep
from tests.support.report import HANG, Report, children, descriptors


class Launched:
    """One launch, and the future of its end."""

    def __init__(self, launcher: LocalLauncher, command: Command) -> None:
        self._ended: asyncio.Future[Exit] = launcher.loop.create_future()
        handle = launcher.launch(command, self._ended.set_result)
        assert isinstance(handle, LocalHandle)
        self.handle = handle

    async def exit(self) -> Exit:
        return await asyncio.wait_for(self._ended, HANG)


def command(report: Report, *options: str, spec: bytes = b"", run: str = "none") -> Command:
    env = {"PATH": os.environ["PATH"], procs.RUN_MARK: run}
    return Command(report.child(*options), env, spec, report.path.with_name("rank.log"))


def run(play: Callable[[LocalLauncher], Awaitable[None]], **options: float) -> None:
    """Play in a loop with a launcher; whatever happens, all that it launched is gone afterwards, unreaped ones too."""

    async def body() -> None:
        launcher = LocalLauncher(asyncio.get_running_loop(), **options)
        try:
            await play(launcher)
        finally:
            await launcher.close()

    before = children()
    asyncio.run(body())
    assert children() <= before


def there(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if procs.read(pid) is not None]


def freeze(pid: int) -> None:
    """Stop a child of ours; returns when it stands still."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def cat(start_new_session: bool = False) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=start_new_session)


@pytest.fixture
def report(tmp_path: Path) -> Iterator[Report]:
    with Report(tmp_path) as report:
        yield report


def test_spec_environment_and_log_arrive(report: Report, tmp_path: Path) -> None:
    spec = os.urandom(MAX_SPEC_BYTES)
    got, env = tmp_path / "spec", tmp_path / "env"

    async def play(launcher: LocalLauncher) -> None:
        order = command(report, "--spec-to", str(got), "--env-to", str(env), "--exit", "0", spec=spec, run="r1")
        assert await Launched(launcher, order).exit() == Exit(0)

    run(play)
    assert got.read_bytes() == spec
    seen = dict(line.split("=", 1) for line in env.read_text().splitlines())
    assert seen.pop(procs.GUARD_MARK)
    assert {key: seen[key] for key in ("PATH", procs.RUN_MARK)} == {"PATH": os.environ["PATH"], procs.RUN_MARK: "r1"}
    assert set(seen) <= {"PATH", procs.RUN_MARK, "LC_CTYPE"}  # Python sets LC_CTYPE for itself in a bare environment
    assert (tmp_path / "rank.log").stat().st_mode & 0o777 == 0o600


def test_what_a_rank_writes_is_appended_to_its_log(report: Report, tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    log.write_text("before\n")

    async def play(launcher: LocalLauncher) -> None:
        order = Command(["/bin/sh", "-c", "echo out; echo err >&2"], {"PATH": os.environ["PATH"]}, b"", log)
        assert await Launched(launcher, order).exit() == Exit(0)

    run(play)
    assert log.read_text() == "before\nout\nerr\n"


def test_a_spec_that_is_too_large_is_refused(report: Report) -> None:
    async def play(launcher: LocalLauncher) -> None:
        with pytest.raises(OSError, match="at most 1048576"):
            launcher.launch(command(report, spec=bytes(MAX_SPEC_BYTES + 1)), lambda _: None)

    run(play)


def test_a_log_that_cannot_be_opened_is_refused_and_leaks_nothing(report: Report, tmp_path: Path) -> None:
    async def play(launcher: LocalLauncher) -> None:
        before = descriptors()
        with pytest.raises(FileNotFoundError):
            launcher.launch(Command(["true"], {}, b"", tmp_path / "nowhere" / "log"), lambda _: None)
        assert descriptors() == before

    run(play)


def test_a_command_that_cannot_be_executed_says_why(tmp_path: Path) -> None:
    async def play(launcher: LocalLauncher) -> None:
        end = await Launched(launcher, Command(["/nowhere/rank"], {}, b"", tmp_path / "log")).exit()
        assert end == Exit(127, error="could not be started: /nowhere/rank: No such file or directory")

    run(play)


def test_the_pid_is_the_ranks_own(report: Report) -> None:
    async def play(launcher: LocalLauncher) -> None:
        launched = Launched(launcher, command(report))
        async with asyncio.timeout(HANG):
            while launched.handle.pid is None:  # noqa: ASYNC110 - a property, with no event of its own
                await asyncio.sleep(0)
        assert launched.handle.pid == report.wait_for(1)["rank"]
        launched.handle.signal(signal.SIGKILL)
        await launched.exit()
        assert launched.handle.pid is None

    run(play)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_is_delivered(report: Report, number: signal.Signals) -> None:
    async def play(launcher: LocalLauncher) -> None:
        launched = Launched(launcher, command(report, "--setsid-grandchild", "--setsid-grandchild"))
        report.wait_for(3)
        launched.handle.signal(number)
        assert await launched.exit() == Exit(-number)
        report.wait_end()
        launched.handle.signal(number)  # a dead one is fine

    run(play)


def test_only_two_signals_have_a_meaning(report: Report) -> None:
    async def play(launcher: LocalLauncher) -> None:
        launched = Launched(launcher, command(report))
        with pytest.raises(ValueError, match="SIGTERM or SIGKILL"):
            launched.handle.signal(signal.SIGUSR1)

    run(play)


def test_a_killed_rank_takes_its_tree_along(report: Report) -> None:
    async def play(launcher: LocalLauncher) -> None:
        launched = Launched(launcher, command(report, "--setsid-grandchild", "--setsid-grandchild", "--ignore-term"))
        os.kill(report.wait_for(3)["rank"], signal.SIGKILL)
        assert await launched.exit() == Exit(-signal.SIGKILL)
        report.wait_end()

    run(play)


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_killed_guard_leaves_nothing(report: Report, monkeypatch: pytest.MonkeyPatch, pidfd: bool) -> None:
    if not pidfd:
        monkeypatch.setattr(procs, "open_pidfd", lambda pid: None)

    async def play(launcher: LocalLauncher) -> None:
        launched = Launched(launcher, command(report, "--setsid-grandchild", "--setsid-grandchild", "--ignore-term"))
        pids = report.wait_for(3).values()
        os.kill(launched.handle.guard_pid, signal.SIGKILL)
        assert await launched.exit() == Exit(-signal.SIGKILL, by="guard")
        assert not there(pids)
        report.wait_end()

    run(play)


def test_a_killed_guard_costs_other_ranks_and_other_children_nothing(report: Report, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()

    async def play(launcher: LocalLauncher) -> None:
        with Report(beside) as neighbour:
            stays = Launched(launcher, command(neighbour, "--setsid-grandchild"))
            neighbour.wait_for(2)
            mine = cat(start_new_session=True)
            launched = Launched(launcher, command(report, "--setsid-grandchild"))
            report.wait_for(2)
            os.kill(launched.handle.guard_pid, signal.SIGKILL)
            await launched.exit()
            assert mine.communicate(b"still here", HANG)[0] == b"still here"
            assert mine.returncode == 0
            stays.handle.signal(signal.SIGTERM)
            assert await stays.exit() == Exit(-signal.SIGTERM)

    run(play)


def test_a_guard_that_is_stuck_goes_with_the_second_kill(report: Report) -> None:
    async def play(launcher: LocalLauncher) -> None:
        launched = Launched(launcher, command(report, "--setsid-grandchild"))
        report.wait_for(2)
        freeze(launched.handle.guard_pid)
        launched.handle.signal(signal.SIGKILL)
        launched.handle.signal(signal.SIGKILL)
        assert await launched.exit() == Exit(-signal.SIGKILL, by="guard")
        report.wait_end()

    run(play)


def test_close_ends_what_is_left_and_tells_its_end(report: Report) -> None:
    async def play(launcher: LocalLauncher) -> None:
        launched = Launched(launcher, command(report, "--setsid-grandchild", "--ignore-term"))
        report.wait_for(2)
        await launcher.close()
        assert await launched.exit() == Exit(-signal.SIGKILL)
        report.wait_end()

    run(play)


def test_twenty_launches_leak_neither_descriptor_nor_child(tmp_path: Path) -> None:
    ends = [
        ("kill-rank", "--setsid-grandchild"),
        ("kill-guard", "--setsid-grandchild"),
        ("term",),
        ("leave", "--exit", "0"),
    ]

    async def once(launcher: LocalLauncher, number: int) -> None:
        how, *options = ends[number % len(ends)]
        folder = tmp_path / str(number)
        folder.mkdir()
        with Report(folder) as report:
            launched = Launched(launcher, command(report, *options))
            rank = report.wait_for(2 if "--setsid-grandchild" in options else 1)["rank"]
            if how == "kill-rank":
                os.kill(rank, signal.SIGKILL)
            elif how == "kill-guard":
                os.kill(launched.handle.guard_pid, signal.SIGKILL)
            elif how == "term":
                launched.handle.signal(signal.SIGTERM)
            await launched.exit()
            report.wait_end()

    async def play(launcher: LocalLauncher) -> None:
        await once(launcher, 0)
        opened, present = descriptors(), children()
        for number in range(1, 21):
            await once(launcher, number)
        assert descriptors() == opened
        assert children() == present

    run(play)


OWNER = """
import asyncio, os, sys
from pathlib import Path
from epdctl.launch.base import Command
from epdctl.launch.local import LocalLauncher

async def main():
    launcher = LocalLauncher(asyncio.get_running_loop(), grace=0.05)
    env = {"PATH": os.environ["PATH"], "EPDCTL_RUN": sys.argv[1]}
    handle = launcher.launch(Command(sys.argv[3:], env, b"", Path(sys.argv[2])), lambda end: None)
    print(handle.guard_pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def owner(report: Report, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Starts a process that plays the daemon; its orphans become ours, so that their end can be waited for."""
    assert procs.become_subreaper()
    started: list[subprocess.Popen[str]] = []

    def start(run: RunId, *options: str) -> tuple[subprocess.Popen[str], int]:
        line = [sys.executable, "-c", OWNER, run, str(tmp_path / "rank.log"), *report.child(*options)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    before = children()
    yield start
    for process in started:
        process.kill()
        process.communicate()
    for pid in children() - before:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("stubborn", [(), ("--ignore-term",)])
def test_a_killed_owner_leaves_nothing(
    owner: Callable[..., tuple[subprocess.Popen[str], int]], report: Report, stubborn: tuple[str, ...]
) -> None:
    process, guard = owner(new_run_id(), "--setsid-grandchild", "--setsid-grandchild", *stubborn)
    report.wait_for(3)
    process.kill()
    report.wait_end()
    process.wait(HANG)
    assert os.waitpid(guard, 0) == (guard, 0)


@pytest.mark.parametrize("pidfd", [True, False])
def test_what_outlives_both_owner_and_guard_is_found_by_the_sweep(
    owner: Callable[..., tuple[subprocess.Popen[str], int]],
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
    pidfd: bool,
) -> None:
    if not pidfd:
        monkeypatch.setattr(procs, "open_pidfd", lambda pid: None)
    run_id = new_run_id()
    process, guard = owner(run_id, "--setsid-grandchild", "--setsid-grandchild", "--ignore-term")
    tree = report.wait_for(3)
    assert {ref.pid for ref in find(run_id)} == {guard, *tree.values()}
    freeze(process.pid)  # so that it cannot end what it adopts between the two kills
    os.kill(guard, signal.SIGKILL)
    process.kill()
    process.wait(HANG)
    assert {ref.pid for ref in find(run_id)} >= {tree["level-1"], tree["level-2"]}
    assert sweep(run_id, HANG) == []
    report.wait_end()
    assert find(run_id) == []


def test_a_sweep_leaves_other_runs_alone(
    owner: Callable[..., tuple[subprocess.Popen[str], int]], report: Report
) -> None:
    run_id = new_run_id()
    owner(run_id)
    rank = report.wait_for(1)["rank"]
    assert sweep(new_run_id(), HANG) == []
    assert rank in {ref.pid for ref in find(run_id)}


def test_a_sweep_returns_what_it_could_not_end(
    owner: Callable[..., tuple[subprocess.Popen[str], int]], report: Report
) -> None:
    run_id = new_run_id()
    owner(run_id)
    rank = report.wait_for(1)["rank"]
    assert rank in {ref.pid for ref in sweep(run_id, 0.0)}


def test_a_pid_that_came_again_is_not_signalled() -> None:
    child = cat()
    seen = procs.read(child.pid)
    assert seen is not None
    assert not procs.kill(procs.ProcessRef(seen.pid, seen.start_time - 1))
    assert child.communicate(b"alive", HANG)[0] == b"alive"
    assert not procs.kill(seen.ref)


def test_a_name_cannot_forge_the_process_table(tmp_path: Path) -> None:
    forged = tmp_path / "x) Z 1 1 1"
    forged.symlink_to("/bin/cat")
    child = subprocess.Popen([str(forged)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = procs.read(child.pid)
    assert seen is not None
    assert (seen.parent, seen.zombie) == (os.getpid(), False)
    child.communicate()


def test_the_probe_names_what_is_missing() -> None:
    assert procs.probe() == procs.Capabilities(pidfd=True, subreaper=True)
    assert procs.probe().missing == []
    assert len(procs.Capabilities(pidfd=False, subreaper=False).missing) == 2
