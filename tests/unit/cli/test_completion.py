"""The shell completes names from the cluster that runs, from the profiles, and never fails in the middle of a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.fake_daemon import Script, running


def complete(line: str) -> list[str]:
    words = line.split(" ")
    env = {"_EPDCTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "epdctl"], env=os.environ | env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("epdctl logs enc", ["encoder-router/0", "encoder/0", "encoder", "encoder-router"]),
        ("epdctl restart dec", ["decode/0", "decode"]),
        ("epdctl status --cluster de", ["demo"]),
        ("epdctl init cpu", ["cpu-demo", "cpu-mono"]),
        ("epdctl heal", ["health"]),
    ],
)
def test_names_come_from_what_is_there(base: Path, line: str, words: list[str]) -> None:
    with running(base, Script()):
        assert complete(line) == words


def test_nothing_running_completes_to_nothing(base: Path) -> None:
    assert complete("epdctl logs enc") == []
