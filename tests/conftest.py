from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import socket_directory


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory whose name leaves room for those of sockets."""
    with socket_directory() as directory:
        yield directory
