"""The encoder's HTTP surface over real sockets: router, ranks with a tower of arithmetic, readers at ports."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from epdctl.encoder.canary import Canary
from epdctl.encoder.client import Part, Reader
from epdctl.encoder.dispatch import RankKey
from epdctl.encoder.inline import Inline
from epdctl.encoder.jobs import Account, Job, Jobs
from epdctl.encoder.orders import EncodeBody, SendBody, parse, target_of
from epdctl.encoder.proof import BUSY, FINE, Prober, norm_of
from epdctl.encoder.router import RouterService
from epdctl.encoder.surface import HttpSurface
from epdctl.encoder.verdict import Roster, judge
from epdctl.encoder.worker import EncoderService
from epdctl.engine.api import Prepared
from epdctl.errors import RequestError
from epdctl.families.samples import PNG
from epdctl.ids import Incarnation, Modality, RankName, RequestId, Stage
from epdctl.rank.service import HearsAbsent
from epdctl.wire.config import EncoderConfig, EncoderHttp, Limits, ModelConfig
from epdctl.wire.deliver import ENCODER_TO_READER, READER_TO_ENCODER, Embeddings, Received
from epdctl.wire.encode import Encode, Encoded, EncodeItem, ItemEncoded, MediaItem, Prove
from epdctl.wire.lifecycle import Absent, Endpoints
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.transfer import TensorSpec
from tests.support.ranks import Facts, make_peer, make_spec, run
from tests.support.towers import CANARY_SEED, WIDTH, ToyTower, embedding, picture
from tests.unit.encoder.test_services import Gate, World, in_world, turns_until

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


def test_inline_is_safetensors_in_the_answer(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        reply = await site.encode(5, 6, deliver_to="inline")
        assert reply.status_code == 200, reply.text
        tensors = load(reply.content)
        assert torch.equal(tensors["0"], embedding(ROWS, 5))
        assert torch.equal(tensors["1"], embedding(ROWS, 6))
        length = int.from_bytes(reply.content[:8], "little")
        metadata = json.loads(reply.content[8 : 8 + length])["__metadata__"]
        assert (metadata["req_id"], json.loads(metadata["grids"])) == ("a", [[1, 4, 4], [1, 4, 4]])

    at_site(sockets, tmp_path, test)


def test_every_port_of_prefill_gets_its_own_and_the_caller_has_one(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for number in range(2):
            await site.encoder(number)
        readers = [site.reader(token="mine") for _ in range(3)]
        ports = [port for _, port in readers]
        reply = await site.encode(1, 2, 3, deliver_to="prefill", embedding_port=ports, reader_token="mine")
        assert reply.status_code == 200, reply.text
        sizes = reply.json()
        assert (sizes["embedding_len"], sizes["embedding_dim"], sizes["dtype"]) == (3 * ROWS, WIDTH, "float32")
        assert sizes["embedding_size"] == 3 * ROWS * WIDTH * 4
        for reader, _ in readers:
            check(await reader.part("a", seconds=30), 1, 2, 3)
        reader, port = site.reader()
        reply = await site.encode(7, deliver_to="caller", embedding_port=port, num_parts=3, part_idx=2)
        assert reply.status_code == 200
        part = await reader.part("a", 2, seconds=30)
        assert (part.part_idx, part.num_parts) == (2, 3)
        check(part, 7)

    at_site(sockets, tmp_path, test)


def test_in_two_phases_the_size_is_told_before_the_forward_and_send_delivers(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate = Gate()
        tower = PictureTower(gate=gate.open, began=gate.tower().began)
        await site.encoder(tower=tower)
        reply = await site.encode(8)  # the forward is held, and yet there is an answer
        assert reply.status_code == 200
        assert reply.json()["items"] == [{"grid": [1, 4, 4], "rows": ROWS, "nbytes": ROWS * WIDTH * 4}]
        assert (await site.encode(9)).status_code == 409, "the same part again, with other content"
        assert "epdctl_encoder_held_bytes 96.0" in (await site.http.get("/metrics")).text
        first, port = site.reader()
        sending = asyncio.ensure_future(site.send(deliver_to="prefill", embedding_port=port, receive_count=2))
        gate.open.set()
        assert (await sending).status_code == 200
        check(await first.part("a", seconds=30), 8)
        reply = await site.send(deliver_to="inline", receive_count=2)
        assert torch.equal(load(reply.content)["0"], embedding(ROWS, 8))
        assert (await site.send(deliver_to="inline")).status_code == 404, "two had been asked for"
        assert "epdctl_encoder_held_bytes 0.0" in (await site.http.get("/metrics")).text
        assert (await site.encode(9)).status_code == 200

    at_site(sockets, tmp_path, test)


def held(site: Site) -> tuple[Gate, PictureTower]:
    """A tower whose forwards wait until the gate is opened."""
    gate = Gate()
    return gate, PictureTower(gate=gate.open, began=gate.tower().began)


def test_send_keeps_to_its_own_budget_while_the_forward_runs(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(tower=tower)
        assert (await site.encode(8)).status_code == 200
        reply = await site.send(deliver_to="inline", budget_s=0.01)
        assert (reply.status_code, reply.json()["code"]) == (504, "deadline")
        gate.open.set()
        assert (await site.send(deliver_to="inline")).status_code == 200, "it is held still"

    at_site(sockets, tmp_path, test)


def test_whoever_waits_for_what_is_let_go_hears_of_it(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(tower=tower)
        assert (await site.encode(8, budget_s=0.5)).status_code == 200
        reply = await site.send(deliver_to="inline")  # with a budget of minutes, and the hold ends before
        assert (reply.status_code, reply.json()["code"]) == (504, "deadline")
        assert (await site.send(deliver_to="inline")).status_code == 404
        gate.open.set()

    at_site(sockets, tmp_path, test)


def test_whoever_waits_for_a_job_that_is_forgotten_hears_of_it(sockets: Path) -> None:
    async def test(world: World) -> None:
        await world.router()
        jobs = Jobs(str(world.peers["encoder-router/0"].endpoints.inbox), 1 << 20)
        item = MediaItem(index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2 * ROWS], rows=ROWS)
        for forget in (jobs.forget, lambda _: jobs.close()):
            job = jobs.start([(item, picture(ROWS, 3))], 300.0)
            waiting = asyncio.ensure_future(job.embeddings(asyncio.get_running_loop().time() + 300.0))
            await asyncio.sleep(0)
            forget(job)
            with pytest.raises(RequestError):
                await waiting

    in_world(sockets, test)


def test_a_hold_that_failed_says_so_once_and_may_be_asked_for_again(sockets: Path, tmp_path: Path) -> None:
    """The part was "held already" until the budget ended, and nobody could ever send it."""

    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(0, tower)
        assert (await site.encode(8)).status_code == 200
        sending = asyncio.ensure_future(site.send(deliver_to="inline"))
        await gate.began.count(1)
        del site.world.peers["encoder/0"]
        site.world.tell()
        assert (await sending).status_code == 503
        assert "epdctl_encoder_held_bytes 0.0" in (await site.http.get("/metrics")).text
        await site.encoder(1)
        assert (await site.encode(8)).status_code == 200, "asked for again"
        assert (await site.send(deliver_to="inline")).status_code == 200
        gate.open.set()

    at_site(sockets, tmp_path, test)


def test_a_send_that_comes_after_the_failure_hears_why(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(0, tower)
        assert (await site.encode(8)).status_code == 200
        await gate.began.count(1)
        del site.world.peers["encoder/0"]
        site.world.tell()
        reply = await site.send(deliver_to="inline")
        assert (reply.status_code, reply.json()["code"]) == (503, "rank_lost")
        assert (await site.send(deliver_to="inline")).status_code == 404
        gate.open.set()

    at_site(sockets, tmp_path, test)


def test_one_req_id_twice_at_once_is_held_once(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        replies = await asyncio.gather(*(site.encode(seed) for seed in (5, 6)))
        assert sorted(reply.status_code for reply in replies) == [200, 409]
        assert "epdctl_encoder_held_bytes 96.0" in (await site.http.get("/metrics")).text

    at_site(sockets, tmp_path, test)


def test_embeddings_of_every_request_share_one_account(sockets: Path, tmp_path: Path) -> None:
    """Those of direct deliveries were counted nowhere."""

    async def test(site: Site) -> None:
        await site.encoder()
        slow: Inbox[Embeddings] = Inbox(f"tcp://127.0.0.1:{(port := free_port())}", ENCODER_TO_READER, taken)
        site.world.stack.callback(slow.close)
        first = asyncio.ensure_future(site.encode(1, deliver_to="caller", embedding_port=port))
        sender, message = (await arrived.count(1))[0]
        assert "epdctl_encoder_held_bytes 96.0" in (await site.http.get("/metrics")).text
        for fields in ({"deliver_to": "inline"}, {"deliver_to": "caller", "embedding_port": port}, {}):
            reply = await site.encode(2, **fields)
            assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (429, "full", "1")
        slow.reply(sender, Received(delivery=message.delivery), READER_TO_ENCODER)
        assert (await first).status_code == 200
        assert "epdctl_encoder_held_bytes 0.0" in (await site.http.get("/metrics")).text
        assert (await site.encode(2, deliver_to="inline")).status_code == 200
        reply = await site.encode(3, 4, deliver_to="inline")
        assert (reply.status_code, reply.json()["code"]) == (400, "too_large"), "it never fits"

    def taken(sender: Sender, message: Embeddings, _: list[memoryview]) -> None:
        arrived.add((sender, message))

    arrived = Facts()
    at_site(sockets, tmp_path, test, held_bytes=100)


def test_embeddings_in_an_answer_are_counted_until_the_client_has_them() -> None:
    rows, width = 4, 6
    spec = TensorSpec(dtype="float32", shape=[rows, width], nbytes=rows * width * 4)
    account = Account(100)
    item = MediaItem(index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 4, 4], rows=rows)
    job = Job(RequestId("r"), [item], account)
    data = memoryview(bytes(range(96)))
    encoded = Encoded(
        request=job.request, attempt=1, index=0, by=RankName("encoder/0"), incarnation=Incarnation(1), spec=spec
    )
    job.hear(encoded, [data])
    answer = Inline([spec], [data], {"req_id": "a"}, job.borrow())
    job.release()
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        assert account.held == 96
        sent.append(message.get("body", b""))

    run(answer({"type": "http"}, receive_nothing, send))
    assert account.held == 0
    body = b"".join(sent)
    assert int(answer.headers["content-length"]) == len(body)
    assert bytes(load(body)["0"].numpy().tobytes()) == data


async def receive_nothing() -> Any:
    return await asyncio.Event().wait()


def test_draining_waits_for_the_answers_and_not_only_for_the_items(sockets: Path, tmp_path: Path) -> None:
    """The items had ended while a reader was still being served, and closing then answered 500."""

    async def test(site: Site) -> None:
        await site.encoder()
        slow: Inbox[Embeddings] = Inbox(f"tcp://127.0.0.1:{(port := free_port())}", ENCODER_TO_READER, taken)
        site.world.stack.callback(slow.close)
        running = asyncio.ensure_future(site.encode(1, deliver_to="caller", embedding_port=port))
        sender, message = (await arrived.count(1))[0]
        router = site.world.services["encoder-router/0"]
        await turns_until(lambda: router.pulse().inflight == 0)
        draining = asyncio.ensure_future(router.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        slow.reply(sender, Received(delivery=message.delivery), READER_TO_ENCODER)
        await draining
        assert (await running).status_code == 200

    def taken(sender: Sender, message: Embeddings, _: list[memoryview]) -> None:
        arrived.add((sender, message))

    arrived = Facts()
    at_site(sockets, tmp_path, test)


def test_what_comes_while_it_drains_is_refused(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(tower=tower)
        assert (await site.http.get("/health")).status_code == 200  # a connection that stays open
        router = site.world.services["encoder-router/0"]
        assert (await site.encode(1)).status_code == 200
        draining = asyncio.ensure_future(router.drain())
        await gate.began.count(1)
        reply = await site.encode(2, deliver_to="inline")
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "draining", "1")
        gate.open.set()
        await draining

    at_site(sockets, tmp_path, test)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"deliver_to": "mooncake"}, "only between ranks of one cluster"),
        ({"deliver_to": "prefill"}, "needs an embedding_port"),
        ({"deliver_to": "caller"}, "needs an embedding_port"),
        ({"deliver_to": "caller", "embedding_port": [1, 2]}, "has one embedding_port"),
        ({"deliver_to": "inline", "embedding_port": 1}, "takes no embedding_port"),
        ({"embedding_port": 1}, "without deliver_to"),
        ({"deliver_to": "prefill", "embedding_port": 1, "prefill_host": "10.0.0.1"}, "asks for no token"),
        ({"deliver_to": "prefill", "embedding_port": 1, "prefill_host": "evil.example"}, "not an IPv4 address"),
        ({"deliver_to": "somewhere"}, "deliver_to"),
        ({"embedding_port": 70_000, "deliver_to": "caller"}, "embedding_port"),
        ({"part_idx": 1}, "part_idx 1 of 1 parts"),
        ({"mm_items": []}, "mm_items"),
        ({"mm_items": ["http://metadata/"]}, "data: URL"),
        ({"mm_items": ["data:image/png;base64,AAAA"]}, "not a picture"),
        ({"mm_items": [url(1, side=2000)]}, "pixels"),
        ({"mm_items": [url(1), url(1, side=900)]}, "mm_items[1]: it makes 1024 rows; limits.max_context is 1000"),
        ({"mm_items": [url(1)] * 17}, "at most 16"),
        ({"modality": "VIDEO"}, "modality video is not served"),
        ({"modality": "SMELL"}, "modality"),
        ({"surprise": 1}, "surprise"),
        ({"req_id": ""}, "req_id"),
        ({"mm_items": [url(13)], "deliver_to": "inline"}, "an unlucky picture"),
    ],
)
def test_what_is_wrong_with_a_request_is_a_400_that_says_it(
    sockets: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        reply = await site.encode(1, **fields)
        assert (reply.status_code, reply.json()["status"]) == (400, "error"), reply.text
        assert words in reply.json()["message"]

    at_site(sockets, tmp_path, test, limits=Limits(max_pixels=1_000_000, max_context=1000))


def test_the_ranks_word_becomes_the_status(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        reply = await site.encode(1, deliver_to="inline", budget_s=0.05)
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "no_rank", "1")
        gate = Gate()
        await site.encoder(tower=PictureTower(gate=gate.open, began=gate.tower().began))
        running = [asyncio.ensure_future(site.encode(seed, deliver_to="inline")) for seed in (1, 2)]
        await turns_until(lambda: site.world.services["encoder-router/0"].pulse().inflight == 2)
        reply = await site.encode(3, deliver_to="inline")
        assert (reply.status_code, reply.json()["code"]) == (429, "full")
        gate.open.set()
        assert [(await one).status_code for one in running] == [200, 200]

    at_site(sockets, tmp_path, test, limits=Limits(inflight=1, queue=1))


def test_a_reader_that_is_not_there_or_does_not_want_it(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        good, port = site.reader()
        ports = [free_port(), port]
        reply = await site.encode(4, deliver_to="prefill", embedding_port=ports, budget_s=1.0)
        assert reply.status_code == 504
        check(await good.part("a", seconds=30), 4)
        _, guarded = site.reader(token="secret")
        reply = await site.encode(4, deliver_to="caller", embedding_port=guarded, reader_token="guessed")
        assert reply.status_code == 502
        assert "wrong token" in reply.json()["message"]

    at_site(sockets, tmp_path, test)


def test_with_a_token_nothing_is_answered_without_it(sockets: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame\n")

    async def test(site: Site) -> None:
        await site.encoder()
        for path in ("/health", "/metrics", "/health_generate"):
            assert (await site.http.get(path)).status_code == 401
        assert (await site.encode(1)).status_code == 401
        assert (await site.http.get("/health", headers={"authorization": "Bearer guess"})).status_code == 401
        assert (await site.http.get("/health", headers={"authorization": "Bearer sesame"})).status_code == 200

    at_site(sockets, tmp_path, test, token_file=str(tmp_path / "token"))


def test_health_counts_the_ranks_of_the_plan_and_proves_it_with_a_picture(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["status"]) == (503, "unhealthy")
        assert (await site.http.get("/health_generate")).status_code == 503
        tower = PictureTower()
        await site.encoder(0, tower)
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["status"], reply.json()["serving"]) == (200, "degraded", "1 of 2")
        assert [rank["state"] for rank in reply.json()["ranks"]] == ["ready", "not serving"]
        await site.encoder(1)
        assert (await site.http.get("/health")).json()["status"] == "healthy"
        storm = await asyncio.gather(*(site.http.get("/health_generate") for _ in range(20)))
        assert {(reply.status_code, reply.json()["encode"]) for reply in storm} == {(200, FINE)}
        del site.world.peers["encoder/1"]
        site.world.tell()
        tower.encode = lambda batch: [torch.full((item.rows, WIDTH), torch.nan) for item in batch]  # type: ignore[method-assign]
        reply = await site.http.get("/health_generate")
        assert reply.status_code == 503
        assert "its embedding is not finite" in reply.json()["encode"]
        assert "has norm nan" in reply.json()["proofs"]["encoder/0"]

    at_site(sockets, tmp_path, test)


def partly_spoilt(batch: Sequence[Prepared]) -> list[torch.Tensor]:
    seeds = [int(item.pixels[0, 0]) for item in batch]
    made = [embedding(item.rows, seed) for item, seed in zip(batch, seeds, strict=True)]
    for each, seed in zip(made, seeds, strict=True):
        each[-1, -1] = math.inf if seed == 66 else each[-1, -1]
    return made


def test_an_embedding_that_is_not_finite_goes_to_nobody(sockets: Path, tmp_path: Path) -> None:
    """A rank that always had work gave nan to everybody, and was never asked for its canary."""

    async def test(site: Site) -> None:
        tower = PictureTower()
        await site.encoder(tower=tower)
        tower.encode = partly_spoilt  # type: ignore[method-assign]
        replies = await asyncio.gather(*(site.encode(seed, deliver_to="inline") for seed in (5, 66, 7)))
        assert [reply.status_code for reply in replies] == [200, 502, 200]
        assert "not finite" in replies[1].json()["message"]
        encoder = site.world.services["encoder/0"]
        assert isinstance(encoder, EncoderService)
        assert (encoder._here.forward.made, encoder._here.forward.spoilt) == (1 + 2, 1), "with the canary of the start"
        assert encoder.pulse().unhealthy is None

    at_site(sockets, tmp_path, test)


def blind(batch: Sequence[Prepared]) -> list[torch.Tensor]:
    return [torch.zeros(item.rows, WIDTH) for item in batch]


def test_every_rank_is_proved_and_one_that_is_blind_is_named(sockets: Path, tmp_path: Path) -> None:
    """The probe went to whichever rank had least to do, and the others were never looked at."""

    async def test(site: Site) -> None:
        towers = [PictureTower(), PictureTower()]
        for number, tower in enumerate(towers):
            await site.encoder(number, tower)
        reply = await site.http.get("/health_generate")
        assert (reply.status_code, reply.json()["status"]) == (200, "healthy")
        assert reply.json()["proofs"] == {"encoder/0": "fine", "encoder/1": "fine"}
        towers[1].encode = blind  # type: ignore[method-assign]
        for _ in range(2):  # wherever the item went that goes the way of all items
            reply = await site.http.get("/health_generate")
            assert (reply.status_code, reply.json()["status"], reply.json()["serving"]) == (200, "degraded", "1 of 2")
            assert [rank["state"] for rank in reply.json()["ranks"]] == ["ready", "unfit"]
            assert "has norm 0; at the start it was" in reply.json()["proofs"]["encoder/1"]
        towers[0].encode = blind  # type: ignore[method-assign]
        reply = await site.http.get("/health_generate")
        assert (reply.status_code, reply.json()["status"]) == (503, "unhealthy")

    at_site(sockets, tmp_path, test)


def test_a_crowd_is_no_illness_while_its_items_get_done(sockets: Path, tmp_path: Path) -> None:
    """22 of 30 probes of an encoder that had all hands full were 503."""

    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(tower=tower)
        running = [asyncio.ensure_future(site.encode(seed, deliver_to="inline")) for seed in (1, 2)]
        await turns_until(lambda: site.world.services["encoder-router/0"].pulse().inflight == 2)
        probing = asyncio.ensure_future(site.http.get("/health_generate"))
        await turns_until(lambda: 'epdctl_encoder_items_total{end="full"} 1.0' in site.surface._meters.text().decode())
        gate.open.set()
        reply = await probing
        assert (reply.status_code, reply.json()["encode"]) == (200, BUSY), reply.text
        assert reply.json()["proofs"] == {"encoder/0": "fine"}
        assert [(await one).status_code for one in running] == [200, 200]

    at_site(sockets, tmp_path, test, limits=Limits(inflight=1, queue=1))


def test_a_crowd_of_which_nothing_gets_done_is_an_illness(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(tower=tower)
        running = [asyncio.ensure_future(site.encode(seed, deliver_to="inline")) for seed in (1, 2)]
        await turns_until(lambda: site.world.services["encoder-router/0"].pulse().inflight == 2)
        reply = await site.http.get("/health_generate")
        assert (reply.status_code, reply.json()["status"]) == (503, "unhealthy")
        assert "was not encoded: 1 pictures are waiting" in reply.json()["encode"]
        assert "did not answer within 0.1 s" in reply.json()["proofs"]["encoder/0"]
        gate.open.set()
        assert [(await one).status_code for one in running] == [200, 200]

    at_site(sockets, tmp_path, test, limits=Limits(inflight=1, queue=1), canary_deadline=0.1)


def test_a_rank_that_leaves_is_not_waited_for(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(0, tower)
        await site.encoder(1)
        running = asyncio.ensure_future(site.encode(1, deliver_to="inline"))
        await gate.began.count(1)  # on encoder/0, whose canary has to wait
        probing = asyncio.ensure_future(site.http.get("/health_generate"))
        await turns_until(lambda: bool(site.surface._prober._asked))
        del site.world.peers["encoder/0"]
        site.world.tell()
        reply = await probing
        assert (reply.status_code, reply.json()["status"]) == (200, "degraded")
        assert reply.json()["proofs"] == {"encoder/1": "fine"}
        gate.open.set()
        assert (await running).status_code == 200

    at_site(sockets, tmp_path, test)


def test_a_rank_that_drains_is_not_counted_among_those_that_serve(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for number in range(2):
            await site.encoder(number)
        peer = site.world.peers["encoder/1"]
        site.world.peers["encoder/1"] = msgspec.structs.replace(peer, accepting=False)
        site.world.tell()
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["serving"]) == (200, "1 of 2")
        assert [rank["state"] for rank in reply.json()["ranks"]] == ["ready", "draining"]
        del site.world.peers["encoder/1"]
        router = site.world.services["encoder-router/0"]
        assert isinstance(router, HearsAbsent)
        gone = Absent(rank=peer.rank, stage=peer.stage, incarnation=peer.incarnation, reason="failed: no memory")
        router.absent_changed([gone])
        site.world.tell()
        assert (await site.http.get("/health")).json()["ranks"][1]["reason"] == "failed: no memory"

    at_site(sockets, tmp_path, test)


def test_the_canary_waits_for_one_batch_and_not_for_all_that_wait(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        encoder = await world.encoder(tower, encoder=EncoderConfig(batch_patches=4 * ROWS))
        router, answers = world.as_router()
        for number in range(4):
            job = Encode(
                request=RequestId(f"{number}"),
                attempt=1,
                item=MediaItem(
                    index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2 * ROWS], rows=ROWS
                ),
                slot=None,
                notify="",
                budget_s=300.0,
            )
            router.send(EncodeItem(dispatch=number, job=job), [picture(ROWS, number)])
        await gate.began.count(1)
        await turns_until(lambda: encoder._here.forward.waiting == 3)
        before: list[int] = []

        def canary() -> torch.Tensor:
            before.append(len(tower.batches))
            return embedding(1, CANARY_SEED)

        tower.canary = canary
        proving = asyncio.ensure_future(encoder.prove())
        await turns_until(lambda: encoder._here.forward.waiting == 4)
        gate.open.set()
        assert (await proving).fault is None
        assert before == [1]
        await answers.until(lambda seen: sum(isinstance(one, ItemEncoded) for one in seen) == 4)

    in_world(sockets, test)


def test_strictly_one_dead_rank_is_a_503_that_still_says_who_serves(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["status"], reply.json()["serving"]) == (503, "degraded", "1 of 2")

    at_site(sockets, tmp_path, test, strict=True)


def test_a_client_that_hangs_up_frees_its_place(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate = Gate()
        await site.encoder(tower=PictureTower(gate=gate.open, began=gate.tower().began))
        router = site.world.services["encoder-router/0"]
        running = asyncio.ensure_future(site.encode(1, deliver_to="inline"))
        await turns_until(lambda: router.pulse().inflight == 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await router.drain()
        gate.open.set()

    at_site(sockets, tmp_path, test)


def test_a_profile_of_every_rank(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        assert (await site.http.post("/stop_profile")).status_code == 400
        started = await site.http.post("/start_profile")
        assert started.status_code == 200, started.text
        assert (await site.http.post("/start_profile")).status_code == 400
        assert (await site.http.post("/start_profile", content=b'{"what": 1}')).status_code == 400
        assert (await site.encode(1, deliver_to="inline")).status_code == 200
        stopped = await site.http.post("/stop_profile")
        assert stopped.status_code == 200, stopped.text
        assert stopped.json()["profiles"] == [{**started.json()["profiles"][0], "error": None}]
        trace = json.loads(await asyncio.to_thread(Path(stopped.json()["profiles"][0]["path"]).read_text))
        assert any("arange" in event.get("name", "") for event in trace["traceEvents"])

    at_site(sockets, tmp_path, test, profiles=str(tmp_path / "traces"))


def test_a_profile_of_nobody_is_refused_and_one_of_what_was_remembered_says_so(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        reply = await site.http.post("/start_profile")
        assert (reply.status_code, reply.json()["code"]) == (503, "no_rank")
        await site.encoder()
        assert (await site.encode(1, deliver_to="inline")).status_code == 200
        assert (await site.http.post("/start_profile")).status_code == 200
        assert (await site.encode(1, deliver_to="inline")).status_code == 200, "from the cache"
        (profile,) = (await site.http.post("/stop_profile")).json()["profiles"]
        assert profile["note"].startswith("no batch ran while it recorded")
        assert profile["note"].endswith(": 1 embeddings came from the cache")

    at_site(sockets, tmp_path, test, profiles=str(tmp_path / "traces"))


def test_a_profile_is_stopped_once_and_does_not_wait_for_the_dead(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        site.world.peers["encoder/0"] = make_peer("encoder/0", Endpoints(inbox=f"ipc://{sockets}/mute"))
        site.world.tell()
        assert (await site.http.post("/start_profile")).status_code == 200
        stopping = asyncio.ensure_future(site.http.post("/stop_profile"))
        await turns_until(lambda: site.surface._profiles._stopping)
        reply = await site.http.post("/stop_profile")
        assert (reply.status_code, reply.json()["code"]) == (409, "stopping")
        del site.world.peers["encoder/0"]
        site.world.tell()
        reply = await stopping
        assert (reply.status_code, reply.json()["profiles"][0]["error"]) == (500, "nothing was heard of its trace")

    at_site(sockets, tmp_path, test, profiles=str(tmp_path / "traces"))


def test_the_same_ports_again_are_the_same_reader(sockets: Path, tmp_path: Path) -> None:
    """A second try of one shard's /send took the place of the shard that had not asked yet. And a reader that took the
    embeddings, and whose answer was lost, did not want them again."""

    async def test(site: Site) -> None:
        await site.encoder()
        assert (await site.encode(8)).status_code == 200
        readers = [site.reader() for _ in range(2)]
        for reader, port in [readers[0], readers[0], readers[1]]:
            reply = await site.send(deliver_to="prefill", embedding_port=port, receive_count=2)
            assert reply.status_code == 200, reply.text
            assert len(reader._parts) == 1
        for reader, _ in readers:
            check(await reader.part("a", seconds=30), 8)
        assert (await site.send(deliver_to="inline")).status_code == 404

    at_site(sockets, tmp_path, test)


def test_what_a_reader_has_read_is_not_put_before_it_again(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        assert (await site.encode(8)).status_code == 200
        reader, port = site.reader()
        fields = {"deliver_to": "prefill", "embedding_port": port, "receive_count": 9}
        assert (await site.send(**fields)).status_code == 200
        check(await reader.part("a", seconds=30), 8)
        assert (await site.send(**fields)).status_code == 200
        assert not reader._parts
        assert (await site.encode(9, deliver_to="caller", embedding_port=port)).status_code == 200
        check(await reader.part("a", seconds=30), 9)

    at_site(sockets, tmp_path, test)


def test_a_reader_takes_so_many_bytes(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        reader, port = site.reader(max_bytes=100)
        assert (await site.encode(1, deliver_to="caller", embedding_port=port)).status_code == 200
        reply = await site.encode(2, deliver_to="caller", embedding_port=port)
        assert (reply.status_code, "another part 0 of a" in reply.json()["message"]) == (502, True)
        reply = await site.encode(2, req_id="b", deliver_to="caller", embedding_port=port)
        assert (reply.status_code, "96 of at most 100 bytes" in reply.json()["message"]) == (502, True)
        check(await reader.part("a", seconds=30), 1)
        assert (await site.encode(2, req_id="b", deliver_to="caller", embedding_port=port)).status_code == 200

    at_site(sockets, tmp_path, test)


def test_without_a_place_there_is_no_profile(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        reply = await site.http.post("/start_profile")
        assert (reply.status_code, reply.json()["code"]) == (400, "no_place")

    at_site(sockets, tmp_path, test)


def test_metrics_tell_what_was_made_and_what_was_remembered(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        for _ in range(3):
            assert (await site.encode(1, deliver_to="inline")).status_code == 200
        text = (await site.http.get("/metrics")).text
        for line in (
            'epdctl_encoder_embeddings_total{rank="encoder/0",source="made"} 1.0',
            'epdctl_encoder_embeddings_total{rank="encoder/0",source="cached"} 2.0',
            'epdctl_encoder_cache_bytes{rank="encoder/0"} 96.0',
            'epdctl_encoder_items_total{end="encoded"} 3.0',
            'epdctl_encoder_pending{rank="encoder/0"} 0.0',
            'epdctl_encoder_http_requests_total{path="/encode",status="200"} 3.0',
        ):
            assert line in text

    at_site(sockets, tmp_path, test)


class NoRanks:
    def open_ranks(self) -> list[RankKey]:
        return []

    def tell(self, rank: RankKey, message: Prove) -> None:
        raise AssertionError("there is none")


def test_a_storm_of_probes_is_one_probe(sockets: Path) -> None:
    async def test(world: World) -> None:
        _, _, _ = await world.router()
        gate = Gate()
        await world.encoder(gate.tower())
        jobs = Jobs(str(world.peers["encoder-router/0"].endpoints.inbox), 1 << 20)
        world.stack.callback(jobs.close)
        item = MediaItem(index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2 * ROWS], rows=ROWS)
        prober = Prober(NoRanks(), jobs, Canary(picture(ROWS, 3), item), 60.0)
        asking = [asyncio.ensure_future(prober.outcome()) for _ in range(9)]
        await gate.began.count(1)
        assert len(jobs) == 1
        gate.open.set()
        assert {outcome.encode for outcome in await asyncio.gather(*asking)} == {FINE}
        assert len(gate.began.seen) == 1
        assert len(jobs) == 0

    in_world(sockets, test)


# -- pure --


def key(number: int) -> RankKey:
    return RankKey(RankName(f"encoder/{number}"), Incarnation(1))


def ready(*numbers: int) -> Roster:
    return Roster([(key(number), number) for number in numbers])


@pytest.mark.parametrize(
    ("planned", "there", "strict", "word", "status"),
    [
        (2, (0, 1), False, "healthy", 200),
        (2, (0, 1), True, "healthy", 200),
        (3, (0, 2), False, "degraded", 200),
        (3, (0, 2), True, "degraded", 503),
        (2, (), False, "unhealthy", 503),
        (0, (), False, "unhealthy", 503),
        (1, (0, 1), False, "healthy", 200),
    ],
)
def test_the_verdict(planned: int, there: tuple[int, ...], strict: bool, word: str, status: int) -> None:
    verdict = judge(planned, ready(*there), strict=strict)
    assert (verdict.word, verdict.status) == (word, status)
    assert len(verdict.ranks) == max(planned, len(there))


def test_a_rank_that_drains_or_is_unfit_does_not_serve_and_a_missing_one_has_its_reason() -> None:
    why = "unhealthy: the test item's embedding has norm 0"
    absent = [
        Absent(rank=RankName("encoder/3"), stage=Stage.ENCODER, incarnation=Incarnation(2), reason=why),
        Absent(rank=RankName("decode/0"), stage=Stage.DECODE, incarnation=Incarnation(1), reason="failed: no memory"),
    ]
    roster = Roster([(key(0), 1), (key(1), 2), (key(2), 0)], resting=[key(1)], absent=absent)
    verdict = judge(5, roster, strict=False, faults={RankName("encoder/2"): "norm 0"})
    assert (verdict.word, verdict.as_json()["serving"]) == ("degraded", "1 of 5")
    assert [(rank.state, rank.reason) for rank in verdict.ranks] == [
        ("ready", None),
        ("draining", "it finishes what it has"),
        ("unfit", "norm 0"),
        ("not serving", why),
        ("not serving", None),
    ]
    assert judge(1, Roster([(key(0), 1)], resting=[key(0)]), strict=False).status == 503


def test_with_a_token_deliveries_may_go_to_other_machines() -> None:
    body = parse(b'{"req_id":"a","deliver_to":"caller","embedding_port":7,"prefill_host":"10.0.0.1"}', SendBody)
    target = target_of(body, anywhere=True)
    assert target is not None
    assert target.endpoints == ["tcp://10.0.0.1:7"]
    with pytest.raises(RequestError):
        parse(b"{", EncodeBody)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_norm_is_the_same_from_bytes(dtype: str) -> None:
    tensor = torch.arange(12, dtype=getattr(torch, dtype))
    spec = TensorSpec(dtype=dtype, shape=[12], nbytes=tensor.nbytes)
    assert norm_of(memoryview(bytes(tensor.view(torch.uint8).numpy())), spec) == float(tensor.double().norm())
    assert norm_of(memoryview(b"12"), msgspec.structs.replace(spec, dtype="int8")) != 0.0
