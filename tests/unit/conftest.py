from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from epdctl.wire.variables import environment
from tests.support.ranks import socket_directory


@pytest.fixture
def sockets() -> Iterator[Path]:
    with socket_directory() as directory:
        yield directory


@pytest.fixture(autouse=True)
def told_to_use_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan gives a rank with Mooncake: the one engine of this process is asked for TCP."""
    for name, value in environment("mooncake", "tcp").items():
        monkeypatch.setenv(name, value)
