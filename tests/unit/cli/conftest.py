"""The command, run in this process, against clusters under a runtime directory of the test's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from epdctl.cli.main import app

Run = Callable[..., Result]


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Short, because unix sockets live in it; and nothing of the outer environment decides."""
    for name in [name for name in os.environ if name.startswith("EPDCTL_")]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="epd-") as folder:
        monkeypatch.setenv("EPDCTL_RUNTIME_DIR", f"{folder}/run")
        monkeypatch.setenv("EPDCTL_STATE_DIR", f"{folder}/state")
        monkeypatch.chdir(folder)
        yield Path(folder) / "run"


@pytest.fixture
def run(base: Path) -> Run:
    return lambda *words: CliRunner().invoke(app, list(words), catch_exceptions=False)
