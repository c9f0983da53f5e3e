"""The command as a process: what it imports, its exit status, its streams."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

GUARD_SECONDS = 60
HEAVY = ("torch", "transformers", "fastapi", "ray", "zmq", "pydantic", "httpx", "yaml", "psutil", "rich.table")
TOPOLOGY = """model: {{path: model}}
gateway: {{port: {port}}}
stages:
  encoder: {{replicas: 2, gpus: none}}
  prefill: {{gpus: none}}
  decode: {{gpus: none}}
"""
VERBS = (
    "up", "down", "status", "health", "profile", "logs", "restart", "plan", "schema", "init", "doctor", "events",
    "bench", "version",
)  # fmt: skip
NEVER = ("torch", "transformers", "fastapi", "ray")


def python(
    code: str, *words: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, timeout=GUARD_SECONDS, env=os.environ | (env or {}), cwd=cwd,
    )  # fmt: skip


def epdctl(*words: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return python("from epdctl.cli.main import main; main()", *words, env=env, cwd=cwd)


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = f"import sys, epdctl.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).stdout == "[]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with ./epdctl.yaml and as much of a checkpoint as a plan reads."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    port = free_port()
    (tmp_path / "epdctl.yaml").write_text(TOPOLOGY.format(port=port))
    return tmp_path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_planning_imports_no_engine(folder: Path) -> None:
    code = (
        "import sys; from epdctl.cli.main import app; app(standalone_mode=False)\n"
        f"print([name for name in {NEVER} if name in sys.modules])"
    )
    result = python(code, "plan", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_plan_shows_for_every_rank_what_would_run(folder: Path) -> None:
    text = epdctl("plan", "--name", "mine", cwd=folder)
    made = json.loads(epdctl("plan", "--name", "mine", "--json", cwd=folder).stdout)
    assert (text.returncode, made["cluster"]) == (0, "mine")
    ranks = ["gateway/0", "encoder-router/0", "encoder/0", "encoder/1", "prefill/0", "decode/0"]
    assert [rank["config"]["rank"] for rank in made["ranks"]] == ranks
    lines = text.stdout.splitlines()
    assert [line for line in lines if line in ranks] == ranks
    assert [line for line in lines if line.startswith("  command")] == [
        f"  command  {shlex.join(rank['argv'])}" for rank in made["ranks"]
    ]
    assert any(line.startswith("  env      OMP_NUM_THREADS=") for line in lines)
    assert f"  ports    127.0.0.1:{made['ranks'][0]['config']['gateway']['port']}" in lines
    assert "note: " in text.stderr


def test_a_mistake_in_the_topology_names_its_place(folder: Path) -> None:
    file = folder / "epdctl.yaml"
    file.write_text(file.read_text().replace("prefill", "prefil"))
    result = epdctl("plan", cwd=folder)
    assert (result.returncode, result.stdout) == (2, "")
    assert "epdctl.yaml:5:" in result.stderr
    assert "prefill" in result.stderr


def test_help_names_every_verb_and_carries_no_control_codes() -> None:
    result = epdctl("--help", env={"FORCE_COLOR": "", "TERM": "xterm-256color"})
    assert result.returncode == 0
    for verb in VERBS:
        assert f" {verb} " in result.stdout, verb
    assert "\x1b" not in result.stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code = "from epdctl.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "schema"],
            stdout=writer, stderr=subprocess.PIPE, text=True, timeout=GUARD_SECONDS,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unexpected_error_is_one_line_and_70_and_its_traceback_is_kept() -> None:
    code = (
        "import epdctl.control.cluster as c; from epdctl.cli.main import main\n"
        "def broken(*_): raise ZeroDivisionError('oops')\n"
        "c.find_cluster = broken; main()"
    )
    result = python(code, "status")
    assert result.returncode == 70
    first, hint = result.stderr.splitlines()
    assert first == "error: something is wrong in epdctl itself: ZeroDivisionError: oops"
    kept = Path(hint.split("the traceback is in ")[1].split(";")[0])
    assert "ZeroDivisionError: oops" in kept.read_text()
    kept.unlink()
    assert "Traceback" in python(code, "status", env={"EPDCTL_DEBUG": "1"}).stderr


def test_init_writes_what_plan_reads_and_never_over_a_file(tmp_path: Path) -> None:
    assert epdctl("init", "--list", cwd=tmp_path).stdout.splitlines()
    assert epdctl("init", "cpu-demo", cwd=tmp_path).returncode == 0
    text = (tmp_path / "epdctl.yaml").read_text()
    assert "stages:" in text
    assert epdctl("init", "cpu-demo", cwd=tmp_path).returncode == 2
    assert epdctl("init", "cpu-demo", "--force", cwd=tmp_path).returncode == 0
    wrong = epdctl("init", "cpu-dem", "--force", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "cpu-demo" in wrong.stderr
    assert (tmp_path / "epdctl.yaml").read_text() == text
