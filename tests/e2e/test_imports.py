"""What must stay light stays light: the command, the daemon, the gateway and the router import no model library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "ray")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted(name for name in sys.modules if '.' not in name))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "module",
    ["epdctl.cli.main", "epdctl.supervisor.__main__", "epdctl.gateway.service", "epdctl.encoder.router"],
)
def test_imports_no_model_library(module: str) -> None:
    assert not loaded_after(f"import {module}").intersection(HEAVY)


@pytest.mark.parametrize("module", ["epdctl.cli.main", "epdctl.supervisor.__main__", "epdctl.adapters"])
def test_the_control_plane_imports_no_web_framework(module: str) -> None:
    assert "fastapi" not in loaded_after(f"import {module}")


def test_the_check_can_fail() -> None:
    assert "torch" in loaded_after("import epdctl.engine.api")
