"""A rank that cannot load says why, and ``up -d`` ends: at once where a restart is no use."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from epdctl.control.cluster import list_clusters
from tests.support.cluster import LANGUAGE, Cluster
from tests.support.leaks import no_leaks


def refused(cluster: Cluster, *words: str, status: int = 1) -> str:
    """``up -d`` ends with ``status`` and leaves nothing; what it said."""
    with no_leaks(cluster.env):
        result = cluster.run("up", "-d", "--name", cluster.name, *words)
    assert result.returncode == status, result.stderr
    return result.stderr


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def with_torn_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def without_a_key(prefix: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        victim = next(name for name in sorted(tensors) if prefix in name and name.endswith("weight"))
        del tensors[victim]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "rank", "says"),
    [
        (without_weights, "/0", "safetensors"),
        (with_torn_weights, "/0", "not fully covered"),
        (without_a_key("layers.0.self_attn"), "language/0", "self_attn"),
        (without_a_key("visual.blocks.0"), "encoder/0", "blocks.0"),
    ],
    ids=["no weights", "torn weights", "missing language key", "missing tower key"],
)
def test_a_checkpoint_that_cannot_load(
    tmp_path: Path, checkpoint: Path, damage: Callable[[Path], None], rank: str, says: str
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    damage(model)
    said = refused(Cluster(tmp_path / "c", LANGUAGE.format(model=model, chunk=64), name="bad"))
    assert f"{rank} failed" in said
    assert says in said


def test_a_pool_that_memory_cannot_hold(tmp_path: Path, language_topology: str) -> None:
    topology = language_topology.replace("kv_tokens: 16384", "kv_tokens: 100000000000")
    said = refused(Cluster(tmp_path / "c", topology, name="oom"))
    assert "language/0 failed" in said
    assert "memory" in said.lower()


def refused_while_stopped(cluster: Cluster, *words: str, status: int) -> str:
    """What ``up -d`` says when language/0 is stopped in the middle of its load."""
    with ThreadPoolExecutor(1) as pool:
        said = pool.submit(refused, cluster, *words, status=status)
        while not (found := list_clusters(cluster.env)) and not said.done():
            pass
        assert found, said.result()
        os.kill(cluster.wait("language/0", lambda rank: rank.pid is not None).pid or 0, signal.SIGSTOP)
        return said.result()


def test_a_rank_that_hangs_at_load(tmp_path: Path, language_topology: str) -> None:
    topology = language_topology + "deadlines: {start: 15}\nrestart: {budget: 0}\n"
    said = refused_while_stopped(Cluster(tmp_path / "c", topology, name="hang"), status=1)
    assert "language/0 failed: not ready within 15 s" in said


def test_a_start_that_takes_longer_than_the_caller_waits(tmp_path: Path, language_topology: str) -> None:
    cluster = Cluster(tmp_path / "c", language_topology, name="slow")
    assert "language/0" in refused_while_stopped(cluster, "--wait-timeout", "20", status=5)
