"""A cluster over two GPUs of one host: what travels over NVLink arrives as what travels through host memory does."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.e2e.test_parity import eight, one, three_sizes
from tests.support.checkpoints import tiny_checkpoint
from tests.support.cluster import Answer, Cluster, Part
from tests.support.leaks import no_leaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

# Imported here, it would open sockets of its own in this process, whenever it likes.
WITH_MOONCAKE = pytest.mark.skipif(find_spec("mooncake") is None, reason="Mooncake is an extra")

TOPOLOGY = """\
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  encoder: {{gpus: [0], share: 0.3}}
  prefill: {{gpus: [0], share: 0.3, kv_tokens: 8192, chunk_tokens: 64}}
  decode: {{gpus: [1]}}  # its KV pool by what the GPU has
transfer: {transfer}
"""
KILLED = """\
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  encoder: {{gpus: [0], share: 0.3}}
  prefill: {{gpus: [1], kv_tokens: 8192, chunk_tokens: 64}}
  decode: {{gpus: [0], share: 0.3, kv_tokens: 8192}}
transfer: {{embedding_pool: {most}}}
restart: {{initial: 0.1, maximum: 1}}
limits: {{wait_seconds: 3m}}
"""
ASKED: list[list[Part]] = [(one, three_sizes, eight)[number % 3](100 + 10 * number) for number in range(20)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def over_zmq(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    with _cluster(tmp_path_factory.mktemp("z"), checkpoint, "{backend: zmq}", "zmq") as cluster:
        return _answers(cluster)


@pytest.mark.parametrize(
    ("transfer", "says"),
    [
        ("{backend: auto}", "cuda-ipc, "),
        pytest.param("{backend: mooncake, protocol: nvlink}", "mooncake nvlink, ", marks=WITH_MOONCAKE),
    ],
)
def test_twenty_requests_between_gpus_are_answered_as_over_zmq(
    tmp_path: Path, checkpoint: Path, over_zmq: list[Answer], transfer: str, says: str
) -> None:
    with _cluster(tmp_path, checkpoint, transfer, says) as cluster:
        found = _answers(cluster)
        shown = cluster.run("status", "--cluster", cluster.name)
        print(shown.stdout, shown.stderr)
    assert found == over_zmq
    assert len({answer.token_ids for answer in found}) > len(found) // 2  # the pictures matter


def test_a_rank_killed_under_load_finds_its_gpus_memory_again(
    tmp_path: Path, checkpoint: Path, over_zmq: list[Answer]
) -> None:
    """Prefill's pool fits its GPU once: its predecessor's must be gone, which the encoder had open."""
    most = torch.cuda.get_device_properties(1).total_memory * 6 // 10
    cluster = Cluster(tmp_path, KILLED.format(model=checkpoint, most=most), name="killed")
    with no_leaks(cluster.env):
        cluster.up()
        try:
            for name in ("prefill/0", "decode/0", "encoder/0", "prefill/0"):
                rank = cluster.rank(name)
                with ThreadPoolExecutor(4) as pool:
                    asked = [pool.submit(cluster.ask, parts) for parts in ASKED]
                    next(as_completed(asked)).result()
                    os.kill(rank["pid"], signal.SIGKILL)
                    assert [one.result() for one in asked] == over_zmq, f"{name} was killed"
                cluster.wait_ready(name, incarnation=rank["incarnation"] + 1)
        finally:
            cluster.down()


@contextlib.contextmanager
def _cluster(home: Path, checkpoint: Path, transfer: str, says: str) -> Iterator[Cluster]:
    """Up, with every model rank's transport as ``says``, and down without a trace."""
    cluster = Cluster(home, TOPOLOGY.format(model=checkpoint, transfer=transfer), name=says.split(",")[0].split()[0])
    with no_leaks(cluster.env):
        cluster.up()
        try:
            for rank in cluster.status()["ranks"]:
                if rank["stage"] in ("encoder", "prefill", "decode"):
                    assert (rank["transfer"] or "").startswith(says)
            yield cluster
        finally:
            cluster.down()


def _answers(cluster: Cluster) -> list[Answer]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(cluster.ask, ASKED))
