"""Verbs against a scripted daemon behind the real control socket: what they ask, print and exit with."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from epdctl import __version__
from epdctl.errors import (
    EpdError,
    LoadError,
    Mistake,
    PlacementError,
    RankFailed,
    TopologyError,
    Unreachable,
    UserError,
)
from epdctl.ids import RankName
from epdctl.wire.control import (
    CaptureResult,
    Down,
    Event,
    GetHealth,
    HealthReply,
    Problem,
    RankState,
    Restart,
    StartCaptures,
)
from epdctl.wire.message import to_json
from tests.unit.cli.conftest import Run
from tests.unit.cli.fake_daemon import RUN, Script, running
from tests.unit.cli.replies import BROKEN

VERBS = (
    "up", "down", "ask", "status", "health", "logs", "restart", "events", "plan", "init", "schema", "doctor", "version",
)  # fmt: skip


def write_log(base: Path, name: str, text: str, cluster: str = "demo") -> None:
    logs = base / "state" / cluster / RUN / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / name).write_text(text)


def write_events(base: Path, cluster: str, run: str, *events: Event) -> Path:
    file = base / "state" / cluster / run / "events.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(to_json(event) + b"\n" for event in events))
    return file


def test_status_json_has_the_documented_fields(run: Run, base: Path) -> None:
    with running(base, Script()):
        result = run("status", "--json")
    reply = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (reply["schema"], reply["cluster"], reply["gateway"]) == (1, "demo", "http://127.0.0.1:8000")
    assert [rank["rank"] for rank in reply["ranks"]][:2] == ["gateway/0", "encoder-router/0"]
    encoder = reply["ranks"][2]
    documented = {
        "rank": "encoder/0", "stage": "encoder", "state": "ready", "reason": "serving", "since": 200.0, "pid": 4242,
        "incarnation": 1, "restarts": 0, "restarts_asked": 0,
        "gpus": [{"index": 3, "uuid": "GPU-abc"}], "rss_bytes": 300 << 20, "inflight": 2,
    }  # fmt: skip
    assert documented.items() <= encoder.items()
    assert result.stderr == ""


def test_logs_as_json_are_a_line_each(run: Run, base: Path) -> None:
    with running(base, Script()):
        write_log(base, "encoder-0.2.log", "encoded 3\n")
        result = run("logs", "--json")
    assert json.loads(result.stdout) == {"rank": "encoder/0", "incarnation": 2, "text": "encoded 3"}


def test_status_is_all_on_stdout_with_what_is_wrong_and_what_to_do(run: Run, base: Path) -> None:
    with running(base, Script(watched=[BROKEN])):
        result = run("status")
    assert (result.exit_code, result.stderr) == (0, "")
    title, head, *ranks, remark, _, _, remedy = result.stdout.splitlines()
    assert title == "demo: 1 of 2 ranks ready, gateway http://127.0.0.1:8000"
    assert [line.split()[0] for line in (head, *ranks)] == ["RANK", "gateway/0", "prefill/0"]
    assert remark == "prefill/0 failed: the checkpoint has no key lm_head.weight"
    assert remedy == "  `epdctl restart prefill/0` starts it anew"
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(("verdict", "status"), [("healthy", 0), ("degraded", 1), ("unhealthy", 1)])
def test_health_exits_by_its_verdict(run: Run, base: Path, verdict: str, status: int) -> None:
    script = Script(health=HealthReply(verdict=verdict, problems=[Problem(rank=RankName("decode/0"), text="late")]))
    with running(base, script):
        result = run("health", "--deep", "--timeout", "7")
    assert result.exit_code == status
    assert result.stdout.splitlines() == [verdict, "  decode/0: late"]
    assert script.asked[-1] == GetHealth(deep=True, budget_s=7.0)


def test_health_json_is_the_reply(run: Run, base: Path) -> None:
    with running(base, Script(health=HealthReply(verdict="unhealthy", problems=[Problem(rank=None, text="silent")]))):
        result = run("health", "--json")
    assert json.loads(result.stdout) == {
        "verdict": "unhealthy", "problems": [{"rank": None, "text": "silent"}], "deep_seconds": None,
    }  # fmt: skip
    assert result.exit_code == 1


def test_logs_carry_their_rank_and_no_control_codes_off_a_terminal(run: Run, base: Path) -> None:
    script = Script()
    with running(base, script):
        write_log(base, "encoder-0.1.log", "first\n\x1b[32mloaded\x1b[0m\r\n")
        write_log(base, "encoder-0.2.log", "again\n")
        result = run("logs", "encoder", "--tail", "1", "--previous")
        assert run("logs", "decode").stdout == "", "planned, and has written nothing yet"
        assert run("logs", "decoder").exit_code == 2
    assert (result.stdout, result.stderr) == ("encoder/0        | loaded\n", "")
    assert script.asked == [], "a daemon that hangs is not needed for reading files"


def test_logs_of_the_last_run_when_nothing_runs(run: Run, base: Path) -> None:
    logs = base.parent / "state" / "demo" / "run1" / "logs"
    logs.mkdir(parents=True)
    (logs / "encoder-0.1.log").write_text("first\n")
    (logs / "encoder-0.2.log").write_text("second\nthird\n")
    assert run("logs", "--tail", "1").stdout == "encoder/0        | third\n"
    assert run("logs", "encoder/0", "--previous").stdout == "encoder/0        | first\n"
    assert run("logs", "daemon").stdout == ""
    (logs / "daemon.log").write_text("ours\n")
    assert run("logs", "daemon").stdout == "daemon           | ours\n"
    assert run("logs", "--tail", "1").stdout == "encoder/0        | third\n"
    assert run("logs", "daemon", "--previous").stdout == ""
    assert run("logs", "-f").exit_code == 3
    assert run("logs", "decoder").exit_code == 2


def test_events_of_the_last_run_when_nothing_runs(run: Run, base: Path) -> None:
    state = base.parent / "state" / "demo" / "run1"
    state.mkdir(parents=True)
    events = [
        Event(at=1.0, wall=1.0, kind="state", rank=RankName("encoder/0"), state=RankState.READY),
        Event(at=2.0, wall=2.0, kind="command", text="down"),
    ]
    (state / "events.jsonl").write_bytes(b"".join(to_json(event) + b"\n" for event in events) + b'{"at":3.0,"wa')
    assert [line.split(" ", 2)[2] for line in run("events").stdout.splitlines()] == [
        "encoder/0#0 ready",
        "cluster command: down",
    ]
    assert run("events").stdout.startswith("1970-01-01 "), "the day is said where it is another"
    assert len(run("events", "--tail", "1").stdout.splitlines()) == 1
    assert run("events", "-f").exit_code == 3


def test_restart_and_events(run: Run, base: Path) -> None:
    script = Script()
    with running(base, script):
        assert run("restart", "encoder/0").stdout == "encoder/0\n"
        write_events(base, "demo", RUN, Event(at=1.0, wall=time.time(), kind="command", text="up"))
        events = [json.loads(line) for line in run("events", "--json").stdout.splitlines()]
        assert run("events").stdout.split(" ", 1)[1] == "cluster command: up\n"
    assert script.asked == [Restart(ranks=["encoder/0"])]
    assert [(event["kind"], event["text"]) for event in events] == [("command", "up")]


def test_a_capture_that_fails_on_one_rank_is_told_and_exits_1(run: Run, base: Path, tmp_path: Path) -> None:
    good = CaptureResult(rank=RankName("encoder/0"), path="/c/encoder-0.1.json")
    bad = CaptureResult(rank=RankName("decode/0"), error="it died")
    script = Script(captures=[good, bad])
    with running(base, script):
        result = run("profile", "start", "encoder", "--steps", "3", "--output", str(tmp_path))
        script.captures = [good]
        assert run("profile", "stop").exit_code == 0
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["recording 1 rank into /c", "decode/0 does not: it died"]
    assert script.asked == [StartCaptures(ranks=["encoder"], steps=3, output=str(tmp_path)), "status", "stop_captures"]


def test_down_clears_what_a_killed_daemon_left(run: Run, base: Path) -> None:
    stale = base / "demo"
    stale.mkdir(parents=True)
    (stale / "lock").write_text('{"pid":4194303,"start_time":1,"run":"feedfeedfeedfeed"}')
    result = run("down")
    assert result.exit_code == 0
    assert "removing what a dead run left" in result.stderr
    assert not stale.exists()


def test_down_of_nothing_is_fine(run: Run) -> None:
    result = run("down")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing to take down" in result.stderr


@pytest.mark.parametrize("words", [["--cluster", "one", "status"], ["status", "--cluster", "one"]])
def test_cluster_may_stand_before_or_after_the_verb(run: Run, base: Path, words: list[str]) -> None:
    with running(base, one := Script(), "one"), running(base, two := Script(), "two"):
        assert run(*words).exit_code == 0
        assert run("status").exit_code == 2  # which?
    assert (one.asked, two.asked) == (["status"], [])


def test_cluster_from_the_environment_and_what_is_said_wins(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPDCTL_CLUSTER", "two")
    with running(base, one := Script(), "one"), running(base, two := Script(), "two"):
        run("status")
        run("--cluster", "one", "status")
        run("--cluster", "two", "status", "--cluster", "one")
    assert (len(one.asked), len(two.asked)) == (2, 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no such thing", hint="try another"), 2),
        (Unreachable("silent"), 4),
        (LoadError("bad weights"), 1),
        (EpdError("our fault"), 70),
    ],
)
def test_what_the_daemon_refuses_with_is_the_exit_status(run: Run, base: Path, error: EpdError, status: int) -> None:
    with running(base, Script(refuse=error)):
        result = run("restart", "encoder/0")
    assert result.exit_code == status
    assert f"error: {error.message}" in result.stderr
    assert ("hint: try another" in result.stderr) == (error.hint is not None)
    assert result.stdout == ""


@pytest.mark.parametrize("verb", ["status", "health", "logs -f", "restart encoder/0", "events", "profile stop"])
def test_nothing_running_is_3(run: Run, verb: str) -> None:
    result = run(*verb.split())
    assert (result.exit_code, result.stdout) == (3, "")
    assert "error: no cluster is running" in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (
            TopologyError(
                [Mistake("a.yaml:3:5", "stages.x", "no such stage", "decode?"), Mistake("a.yaml:9:1", "y", "z")]
            ),
            2,
            ["error: a.yaml:3:5: stages.x: no such stage (decode?)", "error: a.yaml:9:1: y: z"],
        ),
        (PlacementError("4 GPUs wanted, 2 here"), 2, ["error: 4 GPUs wanted, 2 here"]),
        (
            RankFailed("encoder/0", "bad key", ["line one"]),
            1,
            ["error: encoder/0 failed: bad key", "  | line one"],
        ),
    ],
)
def test_up_tells_every_mistake(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: EpdError, status: int, told: list[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("epdctl.adapters.make_plan", refuse)
    result = run("up", str(tmp_path / "a.yaml"))
    assert result.exit_code == status
    assert result.stderr.splitlines() == told


def test_up_without_a_file_says_what_to_do(run: Run) -> None:
    result = run("up")
    assert result.exit_code == 2
    assert "epdctl init" in result.stderr


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"epdctl {__version__}\n"
    assert json.loads(run("version", "--json").stdout)["epdctl"] == __version__


def test_bad_usage_is_2(run: Run) -> None:
    for words in (["upp"], ["status", "--nope"], ["restart"], ["logs", "--tail", "many"]):
        assert run(*words).exit_code == 2


def test_down_asks_for_what_was_said(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    monkeypatch.setattr("epdctl.control.client._await_exit", lambda pid: None)  # this process is the fake's
    with running(base, script):
        result = run("down", "--timeout", "3", "--force")
    assert result.exit_code == 0, result.stderr
    assert script.asked == ["status", Down(drain_s=3.0, force=True)]
    assert [line.split(" ", 1)[1] for line in result.stderr.splitlines()[:2]] == [
        "encoder/0#1 draining",
        "encoder/0#1 stopped",
    ]
    assert result.stderr.splitlines()[-1] == "demo: down, nothing is left"


@pytest.mark.parametrize(
    ("word", "verb"), [("ps", "status"), ("ls", "status"), ("top", "status -w"), ("stop", "down"), ("dwon", "down")]
)
def test_a_verb_that_is_called_otherwise_elsewhere_is_understood(run: Run, word: str, verb: str) -> None:
    result = run(word)
    assert result.exit_code == 2
    assert f"Did you mean '{verb}'?" in result.stderr


def test_down_says_what_it_waits_for(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epdctl.control.client._await_exit", lambda pid: None)
    with running(base, Script()):
        told = run("down", "--timeout", "7").stderr.splitlines()
    assert told[0] == "draining: 2 requests in flight, at most 7 s"


def test_down_of_a_name_that_never_was_is_3_and_of_one_that_was_is_0(run: Run, base: Path) -> None:
    with running(base, script := Script()):
        typo = run("down", "--cluster", "dmeo")
        (base.parent / "state" / "other" / "run1").mkdir(parents=True)
        assert run("down", "--cluster", "other").exit_code == 0
    assert (typo.exit_code, typo.stdout) == (3, "")
    assert typo.stderr.splitlines() == [
        "error: no cluster called 'dmeo' is running, and none of this name ever did",
        "hint: running: demo",
    ]
    assert script.asked == []


def test_what_is_over_says_which_it_was_and_it_is_what_ended_last(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPDCTL_STATE_DIR", str(base / "state"))
    event = Event(at=1.0, wall=1.0, kind="down")
    first = write_events(base, "first", "run1", event)
    second = write_events(base, "second", "run2", event)  # began later …
    os.utime(second, (1_000_000_000, 1_000_000_000))
    os.utime(first, (1_000_000_060, 1_000_000_060))  # … and ended earlier
    for verb in ("events", "logs"):
        told = run(verb).stderr
        assert told.startswith("note: of the cluster first, run run1, which is over since 2001-09-09 "), told
        assert "cluster second, run run2" in run(verb, "--cluster", "second").stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f" {verb} [OPTIONS]" in result.stdout


@pytest.mark.parametrize("words", ["profile start", "profile stop", "bench supervisor"])
def test_every_verb_below_another_explains_itself(run: Run, words: str) -> None:
    assert f" {words} [OPTIONS]" in run(*words.split(), "--help").stdout
