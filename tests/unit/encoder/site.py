"""A place for tests of the HTTP surface: router, surface and ranks with a tower of arithmetic, over real sockets."""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image

from epdctl.encoder.client import Part, Reader
from epdctl.encoder.router import RouterService
from epdctl.encoder.surface import HttpSurface
from epdctl.encoder.worker import EncoderService
from epdctl.engine.api import Prepared
from epdctl.errors import RequestError
from epdctl.families.samples import PNG
from epdctl.wire.config import EncoderConfig, EncoderHttp, Limits, ModelConfig
from epdctl.wire.encode import MediaItem
from tests.support.ranks import make_spec
from tests.support.towers import CANARY_SEED, WIDTH, ToyTower, embedding
from tests.unit.encoder.test_services import Gate, World, in_world

SIDE = 56  # pixels: 4 x 4 patches, 4 rows


ROWS = 4


Test = Callable[["Site"], Coroutine[Any, Any, None]]


def url(seed: int, side: int = SIDE) -> str:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (seed, 0, 0)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


class PictureTower(ToyTower):
    """The seed of a picture is its first pixel's red."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.canary = lambda: embedding(ROWS, CANARY_SEED)

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        with Image.open(io.BytesIO(media)) as picture:
            seed = CANARY_SEED if media == PNG else picture.tobytes()[0]
        if seed == 13:
            raise RequestError(400, "an unlucky picture")
        grid = (item.grid[0], item.grid[1], item.grid[2])
        return Prepared(grid=grid, rows=item.rows, patches=4 * item.rows, pixels=torch.full((4 * item.rows, 1), seed))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """A world with a surface, and a client of it."""

    def __init__(self, world: World, http: httpx.AsyncClient, directory: Path) -> None:
        self.world = world
        self.http = http
        self.directory = directory

    async def encoder(self, number: int = 0, tower: ToyTower | None = None) -> None:
        model = ModelConfig(path=str(self.directory), name="tiny", family="qwen2_5_vl")
        spec = make_spec(f"encoder/{number}", self.world.sockets, model=model)
        service = EncoderService(spec, load=(tower or PictureTower()).load)
        await self.world.add(service, f"encoder/{number}")

    async def encode(self, *seeds: int, **fields: Any) -> httpx.Response:
        body = {"req_id": "a", "mm_items": [url(seed) for seed in seeds], **fields}
        return await self.http.post("/encode", json=body)

    async def send(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/send", json={"req_id": "a", **fields})

    @property
    def surface(self) -> HttpSurface:
        router = self.world.services["encoder-router/0"]
        assert isinstance(router, RouterService)
        assert isinstance(router._surface, HttpSurface)
        return router._surface

    def reader(self, **options: Any) -> tuple[Reader, int]:
        port = free_port()
        reader = Reader("127.0.0.1", port, **options)
        self.world.stack.callback(reader.close)
        return reader, port


def at_site(
    sockets: Path,
    tmp_path: Path,
    test: Test,
    *,
    limits: Limits = Limits(),  # noqa: B008
    canary_deadline: float = 30.0,
    **http: Any,
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_5_vl", "image_token_id": 9, "eos_token_id": 1})
    )
    (tmp_path / "preprocessor_config.json").write_text("{}")

    async def work(world: World) -> None:
        surface = EncoderHttp(port=free_port(), **http)
        config = EncoderConfig(ranks=2, http=surface, canary_deadline=canary_deadline)
        model = ModelConfig(path=str(tmp_path), name="tiny", family="qwen2_5_vl")
        spec = make_spec("encoder-router/0", world.sockets, encoder=config, model=model, limits=limits)
        peer = await world.add(RouterService(spec), "encoder-router/0")
        async with httpx.AsyncClient(base_url=str(peer.endpoints.http), timeout=60, trust_env=False) as client:
            await test(Site(world, client, tmp_path))

    in_world(sockets, work)


def check(part: Part, *seeds: int) -> None:
    assert [item.shape for item in part.items] == [(ROWS, WIDTH)] * len(seeds)
    for item, seed in zip(part.items, seeds, strict=True):
        got = torch.frombuffer(bytearray(item.rows), dtype=torch.float32).view(item.shape)
        assert torch.equal(got, embedding(ROWS, seed))


def held(site: Site) -> tuple[Gate, PictureTower]:
    """A tower whose forwards wait until the gate is opened."""
    gate = Gate()
    return gate, PictureTower(gate=gate.open, began=gate.tower().began)
