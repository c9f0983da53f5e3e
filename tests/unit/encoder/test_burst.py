"""A burst of requests over HTTP against small queues: real router, surface and ranks, all with the same limits."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path

import httpx
import torch
from safetensors.torch import load

from epdctl.encoder.worker import EncoderService
from epdctl.wire.config import Limits, ModelConfig
from tests.support.ranks import make_spec
from tests.support.towers import embedding
from tests.unit.encoder.site import ROWS, PictureTower, Site, at_site
from tests.unit.encoder.test_services import turns_until

REQUESTS, PICTURES = 200, 4
SMALL = Limits(inflight=8, queue=32)
SEEDS = [seed for seed in range(256) if seed not in (13, 77)]  # those mean something to the tower


async def encoder(site: Site, number: int) -> EncoderService:
    model = ModelConfig(path=str(site.directory), name="tiny", family="qwen2_5_vl")
    spec = make_spec(f"encoder/{number}", site.world.sockets, model=model, limits=SMALL)
    service = EncoderService(spec, load=PictureTower().load)
    await site.world.add(service, f"encoder/{number}")
    return service


def counted(metrics: str, name: str, label: str) -> Counter[str]:
    """The lines of one counter, summed by one of its labels."""
    found = Counter[str]()
    for labels, count in re.findall(rf"^{name}_total\{{(.*)\}} (.*)$", metrics, re.MULTILINE):
        found[dict(re.findall(r'(\w+)="([^"]*)"', labels))[label]] += int(float(count))
    return found


def test_a_burst_over_http_ends_for_every_request_in_its_embeddings_or_a_refusal_and_the_counts_add_up(
    sockets: Path, tmp_path: Path
) -> None:
    async def test(site: Site) -> None:
        ranks = [await encoder(site, number) for number in range(2)]
        seeds = [[SEEDS[(4 * number + at) % len(SEEDS)] for at in range(PICTURES)] for number in range(REQUESTS)]
        replies = await asyncio.gather(
            *(site.encode(*each, req_id=str(number), deliver_to="inline") for number, each in enumerate(seeds))
        )
        for reply, each in zip(replies, seeds, strict=True):
            check(reply, each)
        statuses = Counter(str(reply.status_code) for reply in replies)
        assert set(statuses) == {"200", "429"}, "some were served, and some were not"
        router = site.world.services["encoder-router/0"]
        await turns_until(lambda: not any(service.pulse().inflight for service in (router, *ranks)))
        metrics = (await site.http.get("/metrics")).text
        assert counted(metrics, "epdctl_encoder_http_requests", "status") == statuses
        ends = counted(metrics, "epdctl_encoder_items", "end")
        assert set(ends) <= {"encoded", "full", "cancelled"}
        assert ends["encoded"] >= PICTURES * statuses["200"]
        assert ends.total() == router.pulse().completed == REQUESTS * PICTURES

    at_site(sockets, tmp_path, test, limits=SMALL)


def check(reply: httpx.Response, seeds: list[int]) -> None:
    if reply.status_code == 200:
        tensors = load(reply.content)
        assert all(torch.equal(tensors[str(at)], embedding(ROWS, seed)) for at, seed in enumerate(seeds))
    else:
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["code"] == "full"
