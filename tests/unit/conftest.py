from __future__ import annotations

import pytest

from epdctl.wire.variables import environment


@pytest.fixture(autouse=True)
def told_to_use_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan gives a rank with Mooncake: the one engine of this process is asked for TCP."""
    for name, value in environment("mooncake", "tcp").items():
        monkeypatch.setenv(name, value)
