"""What the surface does with time and memory: budgets, holds, the account of embeddings, draining."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from epdctl.encoder.inline import Inline
from epdctl.encoder.jobs import Account, Job, Jobs
from epdctl.encoder.requests import OpenRequests
from epdctl.errors import RequestError
from epdctl.ids import Incarnation, Modality, RankName, RequestId
from epdctl.wire.deliver import ENCODER_TO_READER, READER_TO_ENCODER, Embeddings, Received
from epdctl.wire.encode import Encoded, MediaItem
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.transfer import TensorSpec
from tests.support.ranks import Facts, run
from tests.support.towers import picture
from tests.unit.encoder.site import ROWS, PictureTower, Site, at_site, free_port, held
from tests.unit.encoder.test_services import Gate, World, in_world, turns_until


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


async def send_nothing(_: Any) -> None:
    raise AssertionError("nothing was to be answered")


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


@pytest.mark.parametrize(("path", "waited_for"), [("/encode", True), ("/send", True), ("/health_generate", False)])
def test_draining_waits_for_nobody_who_only_looks_on(path: str, waited_for: bool) -> None:
    async def scene() -> None:
        answer = asyncio.Event()

        async def app(*_: Any) -> None:
            await answer.wait()

        requests = OpenRequests(app)
        request = asyncio.ensure_future(requests({"type": "http", "path": path}, receive_nothing, send_nothing))
        await asyncio.sleep(0)
        idle = asyncio.ensure_future(requests.until_none())
        await asyncio.sleep(0)
        assert idle.done() is not waited_for
        answer.set()
        await asyncio.gather(request, idle)

    run(scene())


def test_embeddings_stay_on_the_account_while_a_reader_is_being_served(sockets: Path, tmp_path: Path) -> None:
    """The hold of a part may end meanwhile."""

    async def test(site: Site) -> None:
        await site.encoder()
        slow: Inbox[Embeddings] = Inbox(f"tcp://127.0.0.1:{(port := free_port())}", ENCODER_TO_READER, taken)
        site.world.stack.callback(slow.close)
        assert (await site.encode(1)).status_code == 200
        sending = asyncio.ensure_future(site.send(deliver_to="caller", embedding_port=port))
        sender, message = (await arrived.count(1))[0]
        account, errands = site.surface._jobs.account, site.surface._errands
        held_bytes = account.held
        assert held_bytes > 0
        errands._late(("a", 0))
        assert account.held == held_bytes
        slow.reply(sender, Received(delivery=message.delivery), READER_TO_ENCODER)
        assert (await sending).status_code == 200
        assert account.held == 0

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
        probe = await site.http.get("/health_generate")
        assert (probe.status_code, probe.json()["code"]) == (503, "draining")
        gate.open.set()
        await draining

    at_site(sockets, tmp_path, test)


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
