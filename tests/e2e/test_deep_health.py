"""A tower that goes blind after a deep check has found it well, with an answer that is known and without."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import msgspec
import pytest

from epdctl.adapters import make_plan
from epdctl.bench.clusters import await_ready
from epdctl.bench.clusters import running as started
from epdctl.bench.shapes.model import DIRECTORY
from epdctl.ids import Stage
from epdctl.supervisor.health import CANARY
from epdctl.topology.plan import PlannedRank
from epdctl.wire.control import Problem
from tests.support.cluster import GUARD_SECONDS, Cluster
from tests.support.faulty import BLIND
from tests.support.leaks import no_leaks

# The rank's own canary is made to wait: what is found, the deep check has found.
TOPOLOGY = """
model: {{path: {model}}}
gateway:
  port: ${{EPDCTL_PORT}}
stages:
  mono: {{gpus: none, kv_tokens: 16384, canary: 1h}}
"""


def blind_later(rank: PlannedRank) -> PlannedRank:
    config = msgspec.structs.replace(rank.config, service="tests.support.faulty:blind_later")
    return dataclasses.replace(rank, config=config) if rank.stage is Stage.MONO else rank


@pytest.mark.parametrize("known", [True, False])
def test_a_tower_that_went_blind_after_a_healthy_check_is_found(tmp_path: Path, known: bool) -> None:
    """It stayed healthy: a known answer came from remembered embeddings, and without one any token would do."""
    model = tmp_path / "model"
    shutil.copytree(DIRECTORY, model)
    if not known:
        (model / CANARY).unlink()
    cluster = Cluster(tmp_path / "home", TOPOLOGY.format(model=model), name="blind")
    plan = make_plan(cluster.file, environ=cluster.env, name="blind")
    plan = dataclasses.replace(plan, ranks=tuple(map(blind_later, plan.ranks)))
    with no_leaks(cluster.env), started(plan, cluster.env) as daemon:
        client = daemon.cluster.client
        await_ready(client)
        assert client.health(deep=True, budget_s=GUARD_SECONDS).verdict == "healthy"
        (model / BLIND).touch()
        reply = client.health(deep=True, budget_s=GUARD_SECONDS)
    assert reply.verdict == "unhealthy"
    rank, *answer = reply.problems
    assert rank.rank == "mono/0"
    assert rank.text.startswith("the test item's embedding has norm 0; at the start it was ")
    assert ["expected '1 red, 2 blue', got '" in problem.text for problem in answer] == [True] * known, texts(answer)


def texts(problems: list[Problem]) -> str:
    return " ".join(problem.text for problem in problems)
