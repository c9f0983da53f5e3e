"""A daemon that hangs: it is named with its log, what needs no daemon goes on, and ``down --force`` ends it all."""

from __future__ import annotations

import os
import signal

import pytest
from typer.testing import CliRunner, Result

from epdctl.cli import raising
from epdctl.cli.attach import News, Session
from epdctl.cli.inbox import Inbox
from epdctl.cli.main import app
from tests.lifecycle.conftest import Begin
from tests.support.leaks import GUARD_SECONDS, marked_processes
from tests.support.scripted import Cluster
from tests.support.scripted_rank import Script

TWO = {"gateway/0": Script(), "encoder/0": Script()}


@pytest.fixture
def hung(begin: Begin, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("EPDCTL_RUNTIME_DIR", "EPDCTL_STATE_DIR"):
        monkeypatch.setenv(name, place[name])
    monkeypatch.delenv("EPDCTL_CLUSTER", raising=False)
    monkeypatch.setattr("epdctl.control.client.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("epdctl.control.client.PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("epdctl.control.client.FORCE_SECONDS", 0.2)
    cluster = begin(TWO)
    cluster.until_ready()
    os.kill(cluster.daemon.pid, signal.SIGSTOP)
    return cluster


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


@pytest.mark.parametrize(
    "verb",
    [
        "status", "status -w", "health", "health --deep", "health --timeout 0.1", "events -f", "restart all",
        "profile start", "profile stop", "down",
    ],
)  # fmt: skip
def test_it_is_named_with_its_log_and_its_remedy(hung: Cluster, verb: str) -> None:
    result = run(*verb.split())
    assert result.exit_code == 4
    assert f"(pid {hung.daemon.pid}) has not answered for 0." in result.stderr
    assert str(hung.state.daemon_log) in result.stderr
    assert "`epdctl down --force --cluster scripted`" in result.stderr
    os.kill(hung.daemon.pid, signal.SIGCONT)
    hung.down()


def test_files_are_read_without_it(hung: Cluster) -> None:
    assert run("logs").exit_code == 0
    assert "daemon           | " in run("logs", "daemon").stdout
    assert run("events", "--tail", "1").stdout.endswith(" ready\n")
    os.kill(hung.daemon.pid, signal.SIGCONT)
    hung.down()


def test_a_forced_down_ends_it_from_outside_and_proves_it(hung: Cluster, place: dict[str, str]) -> None:
    assert marked_processes(place), "or the last line would prove nothing"
    result = run("down", "--force")
    assert result.exit_code == 0, result.stderr
    assert f"killing the daemon (pid {hung.daemon.pid}); its ranks end with it" in result.stderr
    assert result.stderr.splitlines()[-1] == "scripted: down, nothing is left"
    assert hung.wait() == -signal.SIGKILL
    assert marked_processes(place) == []


def test_the_second_interrupt_of_an_up_ends_it_from_outside(
    hung: Cluster, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the first one too, when it has waited long enough."""
    monkeypatch.setattr("epdctl.control.client.PATIENCE_SECONDS", GUARD_SECONDS)
    inbox: Inbox[News] = Inbox()
    inbox.interrupt("SIGINT")
    session = Session(hung.daemon.cluster, inbox)
    assert raising._stop(session), "it was killed"
    assert hung.wait() == -signal.SIGKILL
    assert marked_processes(place) == []


def test_one_that_hangs_in_the_middle_of_a_stop_is_found_out(
    begin: Begin, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a drain may take, nobody waits in silence."""
    for name in ("EPDCTL_RUNTIME_DIR", "EPDCTL_STATE_DIR"):
        monkeypatch.setenv(name, place[name])
    monkeypatch.setattr("epdctl.control.client.Client._longest_silence", lambda *_: 0.2)
    cluster = begin(TWO)
    cluster.until_ready()
    stopped: list[int] = []

    def stop_it(line: str) -> None:
        if not stopped:
            stopped.append(cluster.daemon.pid)
            os.kill(cluster.daemon.pid, signal.SIGSTOP)

    monkeypatch.setattr("epdctl.cli.raising.say", stop_it)
    result = run("down")
    assert (result.exit_code, stopped) == (4, [cluster.daemon.pid])
    assert "has not answered for 0.2 s" in result.stderr
    os.kill(cluster.daemon.pid, signal.SIGCONT)
    assert cluster.wait() == 0
