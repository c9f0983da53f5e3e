"""Clusters that several tests share; each comes up once and is proved to leave nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkpoints import tiny_checkpoint
from tests.support.cluster import EPD, LANGUAGE, MONO, PAIRS, Cluster
from tests.support.leaks import no_leaks

CHUNK = 64  # tokens; small, so that ordinary prompts take several


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="session")
def epd_topology(checkpoint: Path) -> str:
    return EPD.format(model=checkpoint, chunk=CHUNK)


@pytest.fixture(scope="session")
def language_topology(checkpoint: Path) -> str:
    return LANGUAGE.format(model=checkpoint, chunk=CHUNK)


def running(cluster: Cluster) -> Iterator[Cluster]:
    with no_leaks(cluster.env):
        cluster.up()
        try:
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="module")
def epd(tmp_path_factory: pytest.TempPathFactory, epd_topology: str) -> Iterator[Cluster]:
    yield from running(Cluster(tmp_path_factory.mktemp("e"), epd_topology, name="epd"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, language_topology: str) -> Iterator[Cluster]:
    yield from running(Cluster(tmp_path_factory.mktemp("l"), language_topology, name="language"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cluster]:
    """Two decode ranks, and a supervisor that is quick to give one up."""
    topology = PAIRS.format(model=checkpoint, chunk=CHUNK)
    yield from running(Cluster(tmp_path_factory.mktemp("p"), topology, name="pairs"))


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cluster]:
    topology = MONO.format(model=checkpoint, chunk=CHUNK)
    yield from running(Cluster(tmp_path_factory.mktemp("m"), topology, name="mono"))
