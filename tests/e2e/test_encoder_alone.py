"""The encoder by itself, behind nobody: pictures over HTTP, real towers in real processes."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load

from epdctl.engine.loading import load_tower
from epdctl.families import open_family
from epdctl.families.base import PictureHeader
from epdctl.ids import Modality
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem
from tests.e2e.conftest import running
from tests.support.cluster import GUARD_SECONDS, Cluster, data_url
from tests.support.reference import picture_bytes

ALONE = """
model: {{path: {model}, name: tiny}}
stages:
  encoder: {{dp: 2, http: {{port: ${{EPDCTL_PORT}}}}}}
restart: {{initial: 0.1, maximum: 1}}
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cluster]:
    yield from running(Cluster(tmp_path_factory.mktemp("a"), ALONE.format(model=checkpoint), name="alone"))


def expected(checkpoint: Path, pictures: list[bytes]) -> list[torch.Tensor]:
    """By the same tower, in this process."""
    model = ModelConfig(path=str(checkpoint), name="tiny", family="qwen2_5_vl")
    tower = load_tower(model, torch.device("cpu"))
    family = open_family(checkpoint)
    made = []
    for index, (picture, side) in enumerate(zip(pictures, ((64, 64), (84, 56)), strict=True)):
        grid = family.span(PictureHeader(*side), 2)
        digest = hashlib.blake2b(picture, digest_size=16).hexdigest()
        item = MediaItem(
            index=index, modality=Modality.IMAGE, content_hash=digest, of=2, grid=list(grid.grid), rows=grid.rows
        )
        made += tower.encode([tower.prepare(picture, item)])
    return made


def health(cluster: Cluster) -> tuple[int, str]:
    reply = httpx.get(f"{cluster.url}/health", timeout=GUARD_SECONDS)
    return reply.status_code, reply.json()["status"]


def test_pictures_become_the_towers_own_embeddings_and_a_killed_rank_only_degrades(
    alone: Cluster, checkpoint: Path
) -> None:
    pictures = [picture_bytes(1, 64, 64), picture_bytes(2, 84, 56)]
    body = {"req_id": "a", "mm_items": [data_url(picture) for picture in pictures], "deliver_to": "inline"}
    reply = httpx.post(f"{alone.url}/encode", json=body, timeout=GUARD_SECONDS)
    assert reply.status_code == 200, reply.text
    tensors = load(reply.content)
    for number, right in enumerate(expected(checkpoint, pictures)):
        torch.testing.assert_close(tensors[str(number)], right, atol=1e-5, rtol=1e-5)
    assert health(alone) == (200, "healthy")
    proof = httpx.get(f"{alone.url}/health_generate", timeout=GUARD_SECONDS)
    assert (proof.status_code, proof.json()["encode"]) == (200, "fine")
    before = alone.rank("encoder/1")
    os.kill(before["pid"], signal.SIGKILL)
    alone.wait("encoder/1", lambda rank: rank.incarnation > before["incarnation"] or rank.state != "ready")
    assert httpx.post(f"{alone.url}/encode", json=body, timeout=GUARD_SECONDS).content == reply.content
    assert health(alone)[0] == 200
    alone.wait_ready("encoder/1", incarnation=before["incarnation"] + 1)
    assert alone.run("health", "--cluster", "alone").stdout.startswith("healthy")
