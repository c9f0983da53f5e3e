"""``up`` against a scripted daemon: what it waits for, what it prints, what it leaves."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from epdctl.adapters import Found
from epdctl.cli.attach import all_ready, given_up, longest_start
from epdctl.control.cluster import ClusterRef, DaemonProcess
from epdctl.control.paths import ClusterDir
from epdctl.errors import DeadlineExceeded
from epdctl.ids import Incarnation, RankName
from epdctl.topology.plan import Deadlines, Plan, RestartPolicy
from epdctl.wire.control import Down, FollowLogs, LogLine, RankState
from epdctl.wire.lifecycle import Endpoints
from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_daemon import Script, running
from tests.unit.cli.replies import BROKEN, READY, STARTING, rank, reply

PLAN = Plan(
    cluster="demo", source="demo.yaml", adapter="native", ranks=(), restart=RestartPolicy(), deadlines=Deadlines(),
    notes=("transfer: auto → zmq",),
)  # fmt: skip
URL = "http://127.0.0.1:9\n"


@dataclass
class Cluster:
    script: Script
    directory: ClusterDir


@pytest.fixture
def cluster(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A scripted daemon that ``up`` believes to have started."""
    script = Script()
    with running(base, script) as directory:
        record = directory.read_record()
        assert record is not None
        process = DaemonProcess(record.pid, ClusterRef(directory, record))
        monkeypatch.setattr("epdctl.adapters.make_plan", lambda *_, **__: PLAN)
        monkeypatch.setattr("epdctl.cli.raising.start_daemon", lambda *_, **__: process)
        monkeypatch.setattr("epdctl.control.client._await_exit", lambda pid: None)  # this process is the fake's
        yield Cluster(script, directory)


def test_detached_returns_when_every_rank_is_ready(run: Run, cluster: Cluster) -> None:
    cluster.script.watched = [STARTING, READY]
    result = run("up", "-d", "demo.yaml")
    assert (result.exit_code, result.stdout) == (0, URL)
    assert result.stderr.splitlines()[:3] == [
        "note: transfer: auto → zmq",
        "gateway/0 ready: serving",
        "encoder/0 starting: loading weights 3/9",
    ]
    assert cluster.directory.path.exists()
    assert cluster.script.asked == ["watch"]


def test_without_a_gateway_the_address_is_the_encoder_s(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = reply(rank("encoder-router/0", endpoints=Endpoints(http="http://127.0.0.1:8110")), gateway=None)
    with running(base, Script(watched=[alone], gateway=None)) as directory:
        record = directory.read_record()
        assert record is not None
        process = DaemonProcess(record.pid, ClusterRef(directory, record))
        monkeypatch.setattr("epdctl.adapters.make_plan", lambda *_, **__: PLAN)
        monkeypatch.setattr("epdctl.cli.raising.start_daemon", lambda *_, **__: process)
        assert run("up", "-d", "demo.yaml").stdout == "http://127.0.0.1:8110\n"


def test_detached_fails_at_once_with_the_reason_and_the_last_lines_and_leaves_nothing(
    run: Run, cluster: Cluster
) -> None:
    cluster.script.watched = [STARTING, BROKEN]
    result = run("up", "-d", "demo.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "error: prefill/0 failed: the checkpoint has no key lm_head.weight" in result.stderr
    assert "  | KeyError\n" in result.stderr
    assert "it was taken down again" in result.stderr
    assert cluster.script.asked[-1] == Down()
    assert not cluster.directory.path.exists()


def test_detached_says_that_somebody_else_took_the_cluster_down(run: Run, cluster: Cluster) -> None:
    cluster.script.watched = [STARTING, replace(STARTING, stopping=True)]
    result = run("up", "-d", "demo.yaml")
    assert result.exit_code == 1
    assert "taken down from elsewhere" in result.stderr


def test_detached_gives_up_at_the_time_out_and_leaves_nothing(run: Run, cluster: Cluster) -> None:
    cluster.script.watched = [STARTING]
    result = run("up", "-d", "demo.yaml", "--wait-timeout", "1")
    assert result.exit_code == DeadlineExceeded.exit_status == 5
    told = result.stderr.splitlines()
    late = told.index("error: not every rank was ready within 1 s")
    assert told[late + 1] == "error: encoder/0 starting: loading weights 3/9", "and not the gateway, which is ready"
    assert not cluster.directory.path.exists()


def test_interrupted_before_it_is_ready_it_is_taken_down(
    run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.script.watched = [STARTING]
    monkeypatch.setattr("epdctl.cli.screen.LineScreen.show", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    result = run("up", "-d", "demo.yaml")
    assert result.exit_code == 130
    assert not cluster.directory.path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_the_foreground_logs_follow_until_a_signal_drains_and_stops_it(
    run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    cluster.script.watched = [STARTING, READY]
    cluster.script.lines = [LogLine(rank=RankName("encoder/0"), incarnation=Incarnation(1), text="encoded 3")]
    from epdctl.cli.loglines import LogPrinter

    print_line = LogPrinter.print

    def print_and_signal(self: LogPrinter, line: LogLine) -> None:
        print_line(self, line)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(LogPrinter, "print", print_and_signal)
    before = signal.getsignal(number)
    result = run("up", "demo.yaml")
    assert (result.exit_code, result.stdout) == (0, URL + "encoder/0        | encoded 3\n")
    assert cluster.script.asked == ["watch", FollowLogs(tail=0, follow=True), "status", Down()]
    assert "demo: down, nothing is left" in result.stderr
    assert signal.getsignal(number) is before


def test_a_second_interrupt_kills(run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.script.drains_for_ever = True
    cluster.script.lines = [LogLine(rank=RankName("encoder/0"), incarnation=Incarnation(1), text="busy")]
    interrupts: list[int] = []

    def interrupt_twice(*_: object) -> str:
        if len(interrupts) < 2:
            interrupts.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return "seen"

    monkeypatch.setattr("epdctl.cli.loglines.LogPrinter.print", interrupt_twice)
    monkeypatch.setattr("epdctl.cli.attach.event_line", interrupt_twice)
    result = run("up", "demo.yaml")
    assert result.exit_code == 130, "what was cut off did not go down cleanly"
    assert cluster.script.asked[-4:] == ["status", Down(), "status", Down(force=True)]
    first = "SIGINT: draining: 2 requests in flight, at most 30 s; once more to kill"
    last = "demo: down, nothing is left"
    assert result.stderr.splitlines()[-5:] == [first, "seen", "SIGINT: killing", "seen", last], "each event once"
    assert not cluster.directory.path.exists()


def test_a_reader_that_closed_its_end_is_a_wish_to_stop(
    run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.script.lines = [LogLine(rank=RankName("encoder/0"), incarnation=Incarnation(1), text="nobody reads")]

    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("epdctl.cli.loglines.LogPrinter.print", closed)
    monkeypatch.setattr("epdctl.cli.attach.hush", lambda stream: None)
    assert run("up", "demo.yaml").exit_code == 0
    assert cluster.script.asked[-1] == Down()


def test_a_terminal_that_closes_before_the_address_is_told_is_a_wish_to_stop(
    run: Run, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("epdctl.cli.raising.data", closed)
    monkeypatch.setattr("epdctl.cli.attach.hush", lambda stream: None)
    assert run("up", "demo.yaml").exit_code == 0
    assert Down() in cluster.script.asked  # the thread that follows logs may ask later


def test_a_second_up_is_refused_before_it_says_anything_else(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epdctl.adapters.make_plan", lambda *_, **__: PLAN)
    with running(base, Script()):
        second = run("up", "demo.yaml")
    assert second.exit_code == 2
    assert second.stderr.splitlines() == [
        f"error: the cluster 'demo' is already up (pid {os.getpid()})",
        "hint: look at it with: epdctl --cluster demo status; another needs its own --name and ports",
    ]


def test_a_plan_knows_the_ports_of_the_clusters_that_are_up(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def remember(path: object, **options: object) -> Plan:
        seen.append(options["found"])
        return PLAN

    monkeypatch.setattr("epdctl.adapters.make_plan", remember)
    with running(base, Script()):
        assert run("plan", "demo.yaml").exit_code == 0
    assert seen == [Found(held={9: "demo"})]


def test_up_takes_its_file_from_the_environment(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[object] = []

    def remember(path: object, **options: object) -> Plan:
        seen.extend((path, options["name"]))
        return PLAN

    monkeypatch.setattr("epdctl.adapters.make_plan", remember)
    monkeypatch.setenv("EPDCTL_FILE", str(tmp_path / "mine.yaml"))
    assert run("plan", "--name", "other").exit_code == 0
    assert seen == [tmp_path / "mine.yaml", "other"]


def test_what_ready_and_given_up_mean() -> None:
    assert all_ready(READY)
    assert not all_ready(STARTING)
    assert not all_ready(reply())
    assert given_up(READY) is None
    assert given_up(BROKEN) is BROKEN.ranks[1]
    not_begun = rank("encoder/0", RankState.STOPPED, "not started yet", incarnation=Incarnation(0))
    ended = rank("encoder/0", RankState.STOPPED, "exited with status 0", incarnation=Incarnation(1))
    assert given_up(reply(not_begun)) is None
    assert given_up(reply(ended)) is ended


def test_without_a_time_out_the_daemons_own_deadlines_are_the_bound() -> None:
    assert longest_start(PLAN) == 6 * (600.0 + 5.0 + 30.0) + 60.0
