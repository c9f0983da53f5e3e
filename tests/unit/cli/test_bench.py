"""The bench of the supervisor, with a real daemon: it measures what it says, and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

from epdctl.bench.supervisor import Figures
from tests.unit.cli.conftest import Run


def test_figures_are_milliseconds() -> None:
    assert Figures.of([0.001, 0.002, 0.0301]) == Figures(p50=2.0, max=30.1)


def test_one_round(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = run("bench", "supervisor", "--kills", "1", "--json", "--output", str(file))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads(file.read_text())
    assert (report["schema"], report["kills"], report["ranks"]) == (1, 1, 4)
    for name in ("detect_ms", "ready_ms", "gone_ms", "cli_ms"):
        assert 0 < report[name]["p50"] == report[name]["max"]
    assert report["detect_ms"]["p50"] <= report["ready_ms"]["p50"]
    assert "daemon killed: 12 processes gone" in result.stderr  # guard, rank and grandchild of each
