"""The encoder's HTTP surface over real sockets: router, ranks with a tower of arithmetic, readers at ports."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from epdctl.encoder.orders import EncodeBody, SendBody, parse, target_of
from epdctl.errors import RequestError
from epdctl.wire.config import Limits
from tests.support.towers import WIDTH, embedding
from tests.unit.encoder.site import ROWS, PictureTower, Site, at_site, check, free_port, url
from tests.unit.encoder.test_services import Gate, turns_until


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


def test_an_item_that_its_rank_refuses_is_named_by_its_place(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        reply = await site.encode(1, mm_items=[url(1), url(13)], deliver_to="inline")
        assert (reply.status_code, reply.json()["code"], reply.json()["param"]) == (400, "bad_media", "mm_items[1]")
        assert reply.json()["message"] == "mm_items[1]: an unlucky picture"

    at_site(sockets, tmp_path, test)


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


def test_with_a_token_deliveries_may_go_to_other_machines() -> None:
    body = parse(b'{"req_id":"a","deliver_to":"caller","embedding_port":7,"prefill_host":"10.0.0.1"}', SendBody)
    target = target_of(body, anywhere=True)
    assert target is not None
    assert target.endpoints == ["tcp://10.0.0.1:7"]
    with pytest.raises(RequestError):
        parse(b"{", EncodeBody)
