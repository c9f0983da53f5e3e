"""The bench of the supervisor, with a real daemon: it measures what it says, and leaves nothing."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from epdctl.bench.dispatching import baseline
from epdctl.bench.encoding.measure import Job
from epdctl.bench.supervisor import Figures
from epdctl.errors import UserError
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


def test_dispatch_against_plain_sockets(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = run("bench", "dispatch", "--rounds", "1", "--items", "20", "--json", "--output", str(file))
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads(file.read_text())
    assert (report["rounds"], report["items"]) == (1, 20)
    assert report["ratio_p50"] == pytest.approx(report["p50_us"] / report["base_p50_us"], abs=0.01)
    assert report["ratio_rate"] == pytest.approx(report["rate"] / report["base_rate"], abs=0.01)
    assert len(inspect.getsource(baseline).splitlines()) <= 40


def test_an_encoder_is_fed_and_measured(run: Run) -> None:
    result = run("bench", "encode", "--size", "tiny", "--cpu", "--seconds", "0.5", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [tower["tower"] for tower in report["towers"]] == ["Qwen2.5-VL", "Qwen3-VL"]
    for tower in report["towers"]:
        assert 0 < tower["fast_error"] < 1e-4
        assert tower["fast_ms"] > 0
    assert [flow["name"] for flow in report["flows"]] == ["clients", "undecoded", "stream"]
    assert all(flow["pictures"] > 0 for flow in report["flows"])
    assert sum(flow["checked"] for flow in report["flows"]) > 0
    assert report["packed_ratio"] > 0


def test_without_a_gpu_an_encoder_is_not_measured_as_if_there_were_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("bench", "encode")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: no GPU here that torch can use\nhint: `--cpu` ")


def test_a_size_that_no_tower_has_is_a_usage_error(run: Run) -> None:
    result = run("bench", "encode", "--cpu", "--size", "big")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --size big: there is no such size\nhint: one of 7b, tiny\n"


@pytest.mark.parametrize(
    ("words", "size"), [("", "7b"), ("--cpu", "tiny"), ("--cpu --size 7b", "7b"), ("--size tiny", "tiny")]
)
def test_towers_on_a_cpu_are_tiny_unless_a_size_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str, size: str
) -> None:
    jobs: list[Job] = []

    def end(job: Job, say: object) -> None:
        jobs.append(job)
        raise UserError("enough")

    monkeypatch.setattr("epdctl.bench.encoding.measure.measure", end)
    run("bench", "encode", *words.split())
    assert [(job.size, job.gpu) for job in jobs] == [(size, "--cpu" not in words)]
