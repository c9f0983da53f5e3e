"""Recordings of every rank, started and stopped over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from epdctl.wire.lifecycle import Endpoints
from tests.support.ranks import make_peer
from tests.unit.encoder.site import Site, at_site
from tests.unit.encoder.test_services import turns_until


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


def test_without_a_place_there_is_no_profile(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        reply = await site.http.post("/start_profile")
        assert (reply.status_code, reply.json()["code"]) == (400, "no_place")

    at_site(sockets, tmp_path, test)
