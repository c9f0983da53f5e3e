"""What a rank writes is bounded, and whoever follows it goes on after a cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from epdctl.control.logfiles import log_files, log_path
from epdctl.ids import Incarnation, RankName
from epdctl.supervisor import eventlog
from epdctl.supervisor.eventlog import EventLog
from epdctl.supervisor.logs import LogReader, bound


def test_a_log_beyond_its_bound_keeps_its_newest_half_beside_a_fresh_beginning(tmp_path: Path) -> None:
    path = log_path(tmp_path, RankName("decode/0"), Incarnation(1))
    with path.open("ab", buffering=0) as rank:
        rank.write(b"old line\n" * 20 + b"new line\n" * 20)
        (file,) = log_files(tmp_path)
        follower = LogReader(file)
        assert len(follower.more()) == 40
        bound(tmp_path, limit=400)
        assert path.stat().st_size == 360, "a log within its bound is left alone"
        bound(tmp_path, limit=200)
        rank.write(b"after the cut\n")
    assert path.read_bytes() == b"after the cut\n"
    kept = path.with_name(path.name + ".1").read_bytes()
    assert kept.endswith(b"new line\n" * 11)
    assert len(kept) == 100
    assert [line.text for line in follower.more()] == ["after the cut"]
    assert len(log_files(tmp_path)) == 1, "what was cut off is no incarnation of its own"


def test_the_event_log_begins_a_new_file_beyond_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = EventLog(tmp_path / "events.jsonl", lambda: 0.0)
    monkeypatch.setattr(eventlog, "LONGEST_FILE", 300)
    for number in range(6):
        events.record("command", f"number {number}")
    events.close()
    files = (tmp_path / "events.jsonl.1", tmp_path / "events.jsonl")
    assert all(file.stat().st_size < 600 for file in files)
    assert "number 5" in files[1].read_text()
    assert len(events.since(0)) == 6
