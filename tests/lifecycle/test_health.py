"""The verdict from what ranks say, and from a real answer of the gateway."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import soundfile
from PIL import Image

from epdctl.errors import RankError
from epdctl.families.samples import PNG, WAV, marked
from epdctl.ids import Incarnation, RankName
from epdctl.supervisor.health import CANARY, Canary, ask, deep, question, verdict
from epdctl.supervisor.proofs import Finding
from epdctl.topology.plan import Plan
from epdctl.wire.config import RankConfig
from epdctl.wire.control import HealthReply, RankState, RankStatus
from epdctl.wire.lifecycle import Endpoints
from tests.lifecycle.conftest import Begin
from tests.support.scripted import scripted_plan
from tests.support.scripted_rank import Script

GOOD = {
    "choices": [{"finish_reason": "length", "message": {"content": "x"}}],
    "usage": {"completion_tokens": 4},
    "id": "x",
}


def status(name: str, state: RankState, reason: str = "because") -> RankStatus:
    rank = RankName(name)
    return RankStatus(
        rank=rank,
        stage=rank.stage,
        state=state,
        reason=reason,
        since=0.0,
        pid=None,
        incarnation=Incarnation(1),
        restarts=0,
        gpus=[],
        rss_bytes=None,
        inflight=None,
        completed=None,
        endpoints=Endpoints(),
    )


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"gateway/0": "ready", "encoder/0": "ready", "encoder/1": "ready"}, "healthy"),
        ({"gateway/0": "ready", "encoder/0": "backoff", "encoder/1": "ready"}, "degraded"),
        ({"gateway/0": "ready", "encoder/0": "unhealthy", "encoder/1": "failed"}, "unhealthy"),
        ({"gateway/0": "starting", "encoder/0": "ready"}, "unhealthy"),
        ({}, "unhealthy"),
    ],
)
def test_a_stage_without_a_ready_rank_is_what_makes_a_cluster_unhealthy(states: dict[str, str], expected: str) -> None:
    reply = verdict([status(name, RankState(state)) for name, state in states.items()])
    assert reply.verdict == expected


def test_every_problem_names_its_rank_and_its_reason() -> None:
    reply = verdict([status("gateway/0", RankState.READY), status("decode/0", RankState.FAILED, "no memory")])
    assert [(problem.rank, problem.text) for problem in reply.problems] == [
        ("decode/0", "failed: no memory"),
        (None, "no decode rank is ready"),
    ]


@contextmanager
def gateway(code: int, body: object) -> Iterator[tuple[int, list[dict[str, object]]]]:
    """A port where every POST gets this answer, and what was asked there."""
    asked: list[dict[str, object]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def plan_at(port: int, *others: str) -> Plan:
    return scripted_plan({name: Script() for name in ("gateway/0", *others)}, port=port)


async def all_fit(seconds: float) -> Sequence[Finding]:
    return []


def test_a_real_answer_is_healthy_and_says_how_long_it_took() -> None:
    with gateway(200, GOOD) as (port, asked):
        reply = asyncio.run(
            deep(plan_at(port, "encoder/0"), lambda: HealthReply(verdict="degraded", problems=[]), 30.0, all_fit)
        )
    assert reply.verdict == "degraded", "a good answer mends no rank"
    assert reply.deep_seconds is not None
    assert asked[0]["max_tokens"] == 4
    assert asked[0]["temperature"] == 0


def test_a_rank_that_came_back_while_the_request_waited_is_no_problem_any_more() -> None:
    with gateway(200, GOOD) as (port, asked):

        def verdict() -> HealthReply:
            return HealthReply(verdict="healthy" if asked else "unhealthy", problems=[])

        reply = asyncio.run(deep(plan_at(port), verdict, 30.0, all_fit))
    assert reply.verdict == "healthy"


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (503, {"error": {"message": "no decode rank"}}, "HTTP 503.*no decode rank"),
        (200, {"error": "x"}, "something else than a completion"),
        (200, {**GOOD, "usage": {"completion_tokens": 0}}, "single token"),
        (200, {**GOOD, "choices": [{"message": {"content": "x"}, "finish_reason": None}]}, "finish_reason"),
        (200, {**GOOD, "choices": []}, "finish_reason"),
    ],
)
def test_any_other_answer_is_unhealthy(code: int, body: object, words: str) -> None:
    with gateway(code, body) as (port, _), pytest.raises(RankError, match=words):
        asyncio.run(ask(plan_at(port), 30.0))


def test_no_answer_is_unhealthy() -> None:
    shallow = HealthReply(verdict="healthy", problems=[])
    with gateway(200, GOOD) as (port, _):
        pass
    reply = asyncio.run(deep(plan_at(port), lambda: shallow, 30.0, all_fit))
    assert reply.verdict == "unhealthy"
    assert "did not get through" in reply.problems[0].text
    assert "no gateway" in asyncio.run(deep(scripted_plan({}), lambda: shallow, 1.0, all_fit)).problems[0].text


def test_the_picture_is_one_and_goes_only_where_something_can_see_it() -> None:
    content = json.dumps(question(plan_at(1, "encoder/0")))
    url = json.loads(content)["messages"][0]["content"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    picture.load()
    assert (picture.size, picture.mode) == ((32, 32), "RGB")
    assert len(picture.getcolors(maxcolors=1024) or ()) > 500
    assert "image_url" not in json.dumps(question(plan_at(1, "language/0")))


def test_a_model_that_hears_is_asked_about_a_clip() -> None:
    plan = with_models(plan_at(1, "encoder/0"), family="qwen2_audio")
    url = json.loads(json.dumps(question(plan)))["messages"][0]["content"][0]["audio_url"]["url"]
    heard = base64.b64decode(url.removeprefix("data:audio/wav;base64,"))
    assert heard != WAV, "encoders remember what they heard"
    assert samples_of(heard) == samples_of(WAV)
    clip = base64.b64encode(WAV).decode()
    asked = json.dumps(question(plan, Canary([], "What is it?", "a dog", sounds=[clip])))
    assert asked.count("data:audio/wav;base64,") == 1
    assert "What is it?" in asked


def samples_of(clip: bytes) -> bytes:
    with soundfile.SoundFile(io.BytesIO(clip)) as file:
        return bytes(file.read(dtype="int16").tobytes())


def png(colour: str) -> str:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


PICTURES = [png("red"), png("blue")]


def said(text: str) -> dict[str, object]:
    return {**GOOD, "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


@pytest.fixture
def knowing(tmp_path: Path) -> Callable[[int], Plan]:
    """A plan whose checkpoint says what it must answer."""
    (tmp_path / CANARY).write_bytes(msgspec.json.encode(Canary(PICTURES, "Which colours?", "1 red, 2 blue")))

    return lambda port: with_models(plan_at(port, "encoder/0"), path=str(tmp_path))


def with_models(plan: Plan, **changes: str) -> Plan:
    def changed(config: RankConfig) -> RankConfig:
        return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, **changes))

    return replace(plan, ranks=tuple(replace(rank, config=changed(rank.config)) for rank in plan.ranks))


def test_a_checkpoint_that_knows_an_answer_is_asked_for_it(knowing: Callable[[int], Plan]) -> None:
    with gateway(200, said("1 red, 2 blue")) as (port, asked):
        asyncio.run(ask(knowing(port), 30.0))
    *media, text = asked[0]["messages"][0]["content"]  # type: ignore[index]
    assert text["text"] == "Which colours?"
    assert [pixel_of(part) for part in media] == [(255, 0, 0), (0, 0, 255)]


def picture_in(part: Any) -> bytes:
    return base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))


def pixel_of(part: Any) -> Any:
    return Image.open(io.BytesIO(picture_in(part))).getpixel((0, 0))


@pytest.mark.parametrize("known", [True, False])
def test_no_check_shows_bytes_that_an_earlier_one_showed(knowing: Callable[[int], Plan], known: bool) -> None:
    """Encoders remember pictures by their bytes: a tower that had gone blind was healthy on what it had seen before."""
    with gateway(200, said("1 red, 2 blue")) as (port, asked):
        plan = knowing(port) if known else plan_at(port, "encoder/0")
        for _ in range(2):
            asyncio.run(ask(plan, 30.0))
    contents = [each["messages"][0]["content"][:-1] for each in asked]  # type: ignore[index]
    shown = [picture_in(part) for content in contents for part in content]
    assert len(set(shown)) == len(shown) == (4 if known else 2)
    first, second = ([pixels_of(part) for part in content] for content in contents)
    assert first == second, "and yet it is the same picture"


def pixels_of(part: Any) -> bytes:
    picture = Image.open(io.BytesIO(picture_in(part)))
    picture.load()
    return picture.tobytes()


def test_a_canary_of_another_kind_of_file_is_named(tmp_path: Path) -> None:
    (tmp_path / CANARY).write_bytes(msgspec.json.encode(Canary(["AAAA"], "Which colours?", "1 red")))
    with gateway(200, GOOD) as (port, _), pytest.raises(RankError, match="neither a PNG nor a WAV"):
        asyncio.run(ask(with_models(plan_at(port, "encoder/0"), path=str(tmp_path)), 30.0))


def test_a_marked_picture_is_whole() -> None:
    for mark in ("a", "ab"):
        with Image.open(io.BytesIO(marked(PNG, mark))) as picture:
            picture.verify()
        assert samples_of(marked(WAV, mark)) == samples_of(WAV)


# -- what ranks say when they are to prove themselves, through a real daemon --

ZEROS = "the test item's embedding has norm 0; at the start it was 12"


@pytest.mark.parametrize(
    ("script", "verdict", "words"),
    [
        (Script(), "healthy", None),
        (Script(unfit=ZEROS), "unhealthy", ZEROS),
        (Script(silent_proof=True), "degraded", "asked to prove itself, it did not answer within"),
        (Script(die_in_proof=True), "degraded", "it ended while it was to prove itself"),
    ],
)
def test_every_tower_proves_itself_whoever_answered_the_request(
    begin: Begin, script: Script, verdict: str, words: str | None
) -> None:
    """A model without a known answer was healthy with any token at all, and the request reached one rank of two."""
    with gateway(200, GOOD) as (port, _):
        cluster = begin({"gateway/0": Script(), "encoder/0": Script(), "encoder/1": script}, port=port)
        cluster.until_ready()
        reply = cluster.client.health(deep=True, budget_s=2.0 if script.silent_proof else 60.0)
    assert reply.verdict == verdict
    assert [(problem.rank, (words or "") in problem.text) for problem in reply.problems] == (
        [("encoder/1", True)] if words else []
    )
    assert len(cluster.facts("encoder/0", "prove")) == 1
    assert cluster.facts("gateway/0", "prove") == []


def test_a_wrong_answer_is_named_beside_the_right_one(knowing: Callable[[int], Plan]) -> None:
    with gateway(200, said("1 blue, 2 red")) as (port, _), pytest.raises(RankError) as caught:
        asyncio.run(ask(knowing(port), 30.0))
    assert "expected '1 red, 2 blue', got '1 blue, 2 red'" in caught.value.message


@pytest.mark.parametrize(("script", "verdict"), [(Script(), "healthy"), (Script(unfit=ZEROS), "unhealthy")])
def test_encoders_that_stand_alone_are_proved_and_not_asked(begin: Begin, script: Script, verdict: str) -> None:
    """They were unhealthy for want of a gateway."""
    cluster = begin({"encoder-router/0": Script(), "encoder/0": script})
    cluster.until_ready()
    reply = cluster.client.health(deep=True, budget_s=60.0)
    assert (reply.verdict, reply.deep_seconds) == (verdict, None)
