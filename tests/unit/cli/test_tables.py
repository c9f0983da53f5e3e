"""Renderers: reply structs in, text out."""

from __future__ import annotations

import io

import pytest
from msgspec.structs import replace
from rich.console import Console

from epdctl.cli import tables
from epdctl.cli.console import plain, rank_prefix, show
from epdctl.ids import Incarnation, RankName
from epdctl.wire.control import CaptureReply, CaptureResult, Event, HealthReply, Problem, RankState
from epdctl.wire.lifecycle import Endpoints
from tests.unit.cli.replies import BROKEN, READY, STARTING, rank, reply


def text_of(renderable: object, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m"), (200, "3m20s"), (3600, "1h"), (3661, "1h1m"), (90_061, "1d1h")],
)
def test_duration_has_the_two_largest_units(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0B"),
        (512, "512B"),
        (300 << 20, "300M"),
        (1 << 30, "1.0G"),
        (40 << 30, "40G"),
        (2 << 40, "2.0T"),
    ],
)
def test_size_fits_five_characters(count: int | None, text: str) -> None:
    assert tables.size(count) == text
    assert len(text) <= 5


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_and_cuts_only_the_reason(width: int) -> None:
    wide = reply(
        rank("encoder-router/0", RankState.UNHEALTHY, "no progress for 12 s although 3 items wait", pid=4194304)
    )
    lines = text_of(tables.status_table(wide), width).splitlines()
    assert all(len(line) <= width for line in lines)
    assert lines[0].split() == ["RANK", "STATE", "REASON", "SINCE", "PID", "GPU", "RSS", "INFLIGHT", "RESTARTS"]
    for whole in ("encoder-router/0", "unhealthy", "3m20s", "4194304", "300M"):
        assert whole in lines[1]


def test_every_rank_has_its_line() -> None:
    lines = text_of(tables.status_table(READY), 120).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [status.rank for status in READY.ranks]
    assert lines[3].split() == ["encoder/0", "ready", "serving", "3m20s", "4242", "3", "300M", "2", "0"]


@pytest.mark.parametrize(("restarts", "asked", "shown"), [(0, 0, "0"), (2, 0, "2"), (2, 1, "2+1"), (0, 3, "0+3")])
def test_restarts_that_were_asked_for_stand_apart(restarts: int, asked: int, shown: str) -> None:
    one = reply(rank("decode/0", restarts=restarts, restarts_asked=asked))
    assert text_of(tables.status_table(one), 120).split()[-1] == shown


@pytest.mark.parametrize(
    ("reason", "shown"),
    [("ready", "-"), ("ready; last restart: killed by SIGKILL", "last restart: killed by SIGKILL"), ("all", "all")],
)
def test_a_reason_does_not_say_the_state_again(reason: str, shown: str) -> None:
    one = reply(rank("decode/0", RankState.READY, reason))
    assert f" ready {shown} " in text_of(tables.status_table(one), 120).splitlines()[1]


def test_an_exit_says_how_it_went() -> None:
    gone = Event(
        at=1.0, wall=1.0, kind="exit", rank=RankName("decode/0"), incarnation=Incarnation(2), text="killed by SIGKILL"
    )
    assert tables.event_line(gone).endswith(" decode/0#2 killed by SIGKILL")


def test_several_ways_to_move_bytes_are_told_by_rank_and_one_by_itself() -> None:
    slow, fast = "mooncake tcp, 0.5 GB/s to itself", "mooncake tcp, 3.7 GB/s to itself"
    ranks = rank("encoder/0", transfer=slow), rank("prefill/0", transfer=fast), rank("decode/0", transfer=fast)
    assert tables.remarks(reply(rank("gateway/0"), *ranks)) == [
        f"transfer: {slow} (encoder/0)",
        f"transfer: {fast} (prefill/0, decode/0)",
    ]
    assert tables.remarks(reply(*ranks[1:])) == [f"transfer: {fast}"]


def test_what_waits_for_its_next_try_says_when_that_is() -> None:
    waiting = rank("decode/0", RankState.BACKOFF, "killed by SIGKILL", next_try_s=12.34)
    assert tables.remarks(reply(waiting)) == ["decode/0 backoff: killed by SIGKILL; next try in 12.3 s"]


def test_a_rank_that_was_given_up_gets_its_remedy_in_health_too() -> None:
    problem = Problem(rank=RankName("decode/0"), text="failed: killed by SIGKILL; gave up after 5 restarts in 600 s")
    lines = tables.health_lines(HealthReply(verdict="unhealthy", problems=[problem]))
    assert lines[-1] == "    `epdctl restart decode/0` starts it anew"


def test_encoders_that_stand_alone_are_found_by_their_address() -> None:
    alone = reply(rank("encoder-router/0", endpoints=Endpoints(http="http://127.0.0.1:8110")), gateway=None)
    assert tables.encoder_address(READY) is None, "the gateway's is another"
    assert tables.status_title(alone) == "demo: 1 of 1 ranks ready, gateway (none), encoder http://127.0.0.1:8110"


def test_what_is_not_known_is_a_dash() -> None:
    assert text_of(tables.status_table(BROKEN), 120).splitlines()[2].split()[-6:] == ["3m20s", "-", "-", "-", "-", "0"]


def test_a_failed_rank_is_told_in_full_with_its_last_words_and_without_their_colours() -> None:
    assert tables.remarks(BROKEN) == [
        "prefill/0 failed: the checkpoint has no key lm_head.weight",
        "  | loading",
        "  | KeyError",
        "  `epdctl restart prefill/0` starts it anew",
    ]
    assert tables.remarks(READY) == []


def test_changes_are_told_once() -> None:
    assert list(tables.changes(None, STARTING)) == [
        "gateway/0 ready: serving",
        "encoder/0 starting: loading weights 3/9",
    ]
    assert list(tables.changes(STARTING, STARTING)) == []
    later = reply(rank("gateway/0"), rank("encoder/0"))
    assert list(tables.changes(STARTING, later)) == ["encoder/0 ready: serving"]


def test_health_gives_the_reasons() -> None:
    answer = HealthReply(
        verdict="degraded", problems=[Problem(rank=RankName("encoder/1"), text="restarting")], deep_seconds=0.25
    )
    assert tables.health_lines(answer) == ["degraded (a real request took 0.25 s)", "  encoder/1: restarting"]
    assert tables.health_lines(HealthReply(verdict="unhealthy", problems=[Problem(rank=None, text="silent")])) == [
        "unhealthy",
        "  cluster: silent",
    ]


def test_captures_are_told_per_rank() -> None:
    encoder = RankName("encoder/0")
    results = [
        CaptureResult(rank=RankName("gateway/0"), hops="/c/gateway-0.1.hops.json"),
        CaptureResult(rank=encoder, path="/c/encoder-0.1.json", clock_offset_us=-12.4, clock_uncertainty_us=40.6),
        CaptureResult(rank=RankName("encoder/1"), hops="/c/encoder-1.1.hops.json", note="no batch ran"),
        CaptureResult(rank=RankName("decode/0"), error="it died"),
    ]
    reply = CaptureReply(capture="c", results=results, merged="/c/trace.json.gz")
    lines = text_of(tables.capture_table(reply), 100).splitlines()
    assert [line.split() for line in lines] == [
        ["RANK", "CLOCK", "RESULT"],
        ["gateway/0", "-", "/c/gateway-0.1.hops.json"],
        ["encoder/0", "-12", "±", "41", "µs", "/c/encoder-0.1.json"],
        ["encoder/1", "-", "no", "batch", "ran"],
        ["decode/0", "-", "failed:", "it", "died"],
        ["merged", "/c/trace.json.gz"],
    ]
    failed = CaptureReply(capture="c", results=[], merge_error="the disk is full")
    assert "failed: the disk is full" in text_of(tables.capture_table(failed), 100)


def test_an_event_is_one_line() -> None:
    event = Event(
        at=1.0, wall=0.25, kind="state", rank=RankName("decode/0"), incarnation=Incarnation(2),
        state=RankState.READY, text="two\nlines",
    )  # fmt: skip
    assert tables.event_line(event).split(" ", 1)[1] == "decode/0#2 ready: two lines"
    assert tables.event_line(event).split(" ", 1)[0].endswith(":00.250")
    assert tables.event_line(Event(at=1.0, wall=0.0, kind="command", text="up")).endswith("cluster command: up")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("a\tb", "a\tb"),
        ("\x1b[2K\rbar", "bar"),
        ("ä€", "ä€"),
    ],
)
def test_plain_takes_control_codes_out(text: str, clean: str) -> None:
    assert plain(text) == clean


def test_a_prefix_keeps_its_colour_and_has_none_off_a_terminal() -> None:
    assert rank_prefix("encoder/0", 12, colours=False) == "encoder/0    | "
    assert rank_prefix("encoder/0", 12, colours=True) == rank_prefix("encoder/0", 12, colours=True)
    assert plain(rank_prefix("encoder/0", 12, colours=True)) == "encoder/0    | "
    assert rank_prefix("encoder/0", 12, colours=True) != rank_prefix("encoder/1", 12, colours=True).replace("1 ", "0 ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("out", "env", "coded"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, False),
    ],
)
def test_control_codes_only_where_they_are_welcome(
    monkeypatch: pytest.MonkeyPatch, out: io.StringIO, env: dict[str, str], coded: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in ({"TERM": "xterm-256color"} | env).items():
        monkeypatch.setenv(name, value)
    show(tables.status_table(READY), out)
    assert ("\x1b[" in out.getvalue()) == coded


def test_off_a_terminal_a_table_is_plain_and_cut_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    reason = "a reason that is a good deal longer than any terminal of eighty columns would have room for, " * 2
    show(tables.status_table(reply(rank("encoder/0", RankState.FAILED, reason.strip()))), out)
    assert "\x1b" not in out.getvalue()
    assert reason.strip() in out.getvalue()
    assert all(line == line.rstrip() for line in out.getvalue().splitlines())


def test_only_a_turn_of_a_state_or_a_reason_is_worth_another_table() -> None:
    later = replace(READY, ranks=[replace(status, since=status.since + 1, rss_bytes=7) for status in READY.ranks])
    assert list(tables.turns([STARTING, STARTING, READY, later, BROKEN])) == [STARTING, READY, BROKEN]
