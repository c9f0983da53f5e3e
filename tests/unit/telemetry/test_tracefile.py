"""Traces larger than what is read at once, cut anywhere, and not traces at all."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from epdctl.telemetry import tracefile
from epdctl.telemetry.tracefile import BrokenTrace, TraceFile

EVENTS: list[dict[str, Any]] = [
    {"ph": "X", "name": 'a "quoted" ] name, {', "ts": 1.5, "args": {"traceEvents": [1, 2]}},
    {"ph": "M", "name": "thread_name", "args": {"name": "x" * 50}},
    {"ph": "X", "name": "z", "ts": 4324285804604.293},
]
TEXT = json.dumps(
    {"schemaVersion": 1, "deviceProperties": [{"id": 0}], "baseTimeNanoseconds": 17, "traceEvents": EVENTS, "z": 1},
    indent=1,
)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_every_event_is_read_whatever_is_read_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefile, "CHUNK", chunk)
    trace = TraceFile(io.StringIO(TEXT))
    assert trace.base_ns == 17
    assert list(trace.events()) == EVENTS


def test_without_a_base_times_are_unix_time() -> None:
    assert TraceFile(io.StringIO('{"traceEvents": []}')).base_ns == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"baseTimeNanoseconds": 1}', '{"baseTimeNanoseconds": "x", "traceEvents": [']
)
def test_what_is_no_trace_is_said_to_be_none(text: str) -> None:
    with pytest.raises(BrokenTrace):
        TraceFile(io.StringIO(text))


def test_a_trace_that_ends_early_gives_what_there_is_and_then_says_so() -> None:
    end = TEXT.rindex('"z"')
    for cut in range(TEXT.index("traceEvents") + 20, end, 13):
        read: list[dict[str, Any]] = []
        with pytest.raises(BrokenTrace, match="ends"):
            read.extend(TraceFile(io.StringIO(TEXT[:cut])).events())


def test_an_event_without_end_is_given_up_before_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefile, "CHUNK", 64)
    monkeypatch.setattr(tracefile, "LONGEST", 1000)
    endless = io.StringIO('{"traceEvents": [{"name": "' + "x" * 100_000)
    with pytest.raises(BrokenTrace):
        list(TraceFile(endless).events())
    assert endless.tell() < 3000
