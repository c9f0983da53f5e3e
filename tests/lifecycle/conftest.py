"""A private place for clusters, and clusters of scripted ranks that leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epdctl.topology.plan import Plan
from tests.support.leaks import no_leaks
from tests.support.scripted import Cluster, Scripts, scripted_plan, start, with_facts

Begin = Callable[..., Cluster]


HANG_SECONDS = 120  # against a test that would never end; none is expected to come near it


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise AssertionError(f"the test did not end within {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def place() -> Iterator[dict[str, str]]:
    """An environment with run and state directories of its own; short, because of the paths of unix sockets."""
    base = Path(tempfile.mkdtemp(prefix="epd-", dir="/tmp"))
    (base / "run").mkdir(mode=0o700)
    (base / "state").mkdir()
    yield {
        **os.environ,
        "EPDCTL_RUNTIME_DIR": str(base / "run"),
        "EPDCTL_STATE_DIR": str(base / "state"),
    }
    shutil.rmtree(base)


@pytest.fixture
def begin(place: dict[str, str], tmp_path: Path) -> Iterator[Begin]:
    """``begin(scripts, **plan)`` starts a daemon; when the test is over all are stopped, and nothing is left."""
    clusters: list[Cluster] = []

    def begin(scripts: Scripts, *, lifeline: int | None = None, **plan: object) -> Cluster:
        made: Plan = scripted_plan(with_facts(scripts, tmp_path), **plan)  # type: ignore[arg-type]
        cluster = start(made, place, tmp_path, lifeline)
        clusters.append(cluster)
        return cluster

    with no_leaks(place):
        yield begin
        for cluster in clusters:
            cluster.stop()
