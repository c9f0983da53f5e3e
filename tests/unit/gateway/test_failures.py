"""Ranks that die, refuse, or say nothing; clients that hang up. Every request has one end and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from epdctl.gateway.flight import Flight
from epdctl.gateway.pipeline import Pipeline, pause_before
from epdctl.ids import Stage
from epdctl.rank.service import Pulse
from epdctl.wire.encode import CancelEncode, Encode, FailureKind
from epdctl.wire.message import Message
from epdctl.wire.serve import RANK_TO_GATEWAY, Abort, Decode, Failed, Generate, Granted, Prefill, Token
from tests.support.fake_ranks import Answering, FakeMono
from tests.unit.gateway.harness import (
    EPD,
    LANGUAGE,
    MONO,
    House,
    ask,
    events,
    house,
    image_part,
    picture,
    streamed_text,
)

PICTURES = [image_part(picture(56, 56, "red")), {"type": "text", "text": "or"}, image_part(picture(84, 56, "blue"))]


async def undisturbed(ranks: Iterable[str], question: dict[str, Any]) -> str:
    async with house(*ranks) as home:
        return await home.text(**question)


class Reader:
    """A streamed answer, read as far as a test wants."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.text = ""
        self.chunks: list[Any] = []
        self._lines = response.aiter_lines()

    async def until(self, characters: int) -> None:
        while len(self.text) < characters:
            await self._next()

    async def rest(self) -> str:
        while not self.chunks or self.chunks[-1] != "[DONE]":
            await self._next()
        return self.text

    async def _next(self) -> None:
        line = await anext(self._lines)
        if line:
            self.chunks += events(line)
            self.text = streamed_text(self.chunks)


@asynccontextmanager
async def reading(home: House, **question: Any) -> AsyncIterator[Reader]:
    async with home.http.stream("POST", "/v1/chat/completions", json={**question, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        yield Reader(response)


def count(home: House, name: str, **labels: str) -> float:
    return home.service._meters.registry.get_sample_value(name, labels) or 0.0


# -- ranks that die --


@pytest.mark.parametrize(
    ("ranks", "victim"),
    [(EPD, "decode/0"), (LANGUAGE, "language/0"), (MONO, "mono/0")],
    ids=["decode", "language", "mono"],
)
@pytest.mark.parametrize("content", ["what?", PICTURES], ids=["text", "pictures"])
def test_lost_in_mid_answer_and_resumed(ranks: tuple[str, ...], victim: str, content: object) -> None:
    question = ask(content, max_tokens=20)

    async def scene() -> None:
        whole = await undisturbed(ranks, question)
        async with house(*ranks) as home:
            home.cluster[victim].script.stop_after = 7
            async with reading(home, **question) as reader:
                await reader.until(7)
                home.cluster.kill(victim)
                home.cluster.up(victim)
                assert await reader.rest() == whole
                assert reader.chunks[-2]["resumes"] == 1
                assert reader.chunks[-2]["choices"][0]["finish_reason"] == "length"
            jobs: list[Decode | Generate] = [*home.cluster[victim].all(Decode), *home.cluster[victim].all(Generate)]
            assert [(job.attempt, job.sampling.max_tokens) for job in jobs] == [(2, 13)]
            assert count(home, "epdctl_attempts_lost_total", stage=victim.partition("/")[0]) == 1
            assert count(home, "epdctl_resumes_total") == 1
            await home.idle()

    asyncio.run(scene())


@pytest.mark.parametrize("victim", ["prefill/0", "decode/0", "encoder-router/0"])
def test_lost_before_the_first_token(victim: str) -> None:
    question = ask(PICTURES, max_tokens=9)
    kinds: dict[str, type[Message]] = {"prefill/0": Prefill, "decode/0": Decode, "encoder-router/0": Encode}

    async def scene() -> None:
        whole = await undisturbed(EPD, question)
        async with house(*EPD) as home:
            home.cluster[victim].script.mute = True
            asking = asyncio.create_task(home.text(**question))
            await home.cluster[victim].hears(kinds[victim])
            others = [home.cluster[name] for name in kinds if name != victim]
            home.cluster.kill(victim)
            for other in others:
                if other.rank.stage is Stage.ENCODER_ROUTER:
                    assert (await other.hears(CancelEncode))[0].attempt == 1
                else:
                    assert (await other.hears(Abort))[0].attempt == 1
            home.cluster.up(victim)
            assert await asking == whole
            assert count(home, "epdctl_resumes_total") == 0
            await home.idle()

    asyncio.run(scene())


def test_a_prefill_rank_that_did_its_part_is_not_missed() -> None:
    async def scene() -> None:
        question = ask(PICTURES, max_tokens=9)
        async with house(*EPD) as home:
            decode = home.cluster["decode/0"]
            assert isinstance(decode, Answering)
            decode.script.stop_after = 1
            async with reading(home, **question) as reader:
                await reader.until(1)
                home.cluster.kill("prefill/0")
                home.cluster.kill("encoder-router/0")
                decode.go_on()
                assert len(await reader.rest()) == 9
                assert reader.chunks[-2]["resumes"] == 0
            assert count(home, "epdctl_attempts_total") == 1
            await home.idle()

    asyncio.run(scene())


def test_a_rank_that_fails_after_its_part_changes_nothing() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            decode, prefill = home.cluster["decode/0"], home.cluster["prefill/0"]
            assert isinstance(decode, Answering)
            decode.script.stop_after = 1
            async with reading(home, **ask(max_tokens=6)) as reader:
                await reader.until(1)
                [asked] = prefill.all(Prefill)
                failed = Failed(request=asked.request, attempt=1, kind=FailureKind.INTERNAL, text="too late to matter")
                prefill.say(prefill.senders[0], failed)
                async with asyncio.timeout(60):
                    while count(home, "epdctl_late_messages_total") < 1:
                        await home.http.get("/health")
                decode.go_on()
                assert len(await reader.rest()) == 6
            await home.idle()

    asyncio.run(scene())


def test_everything_said_but_the_last_word() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster["decode/0"].script.stop_after = 5
            async with reading(home, **ask(max_tokens=5)) as reader:
                await reader.until(5)
                home.cluster.kill("decode/0")
                await reader.rest()
                assert reader.chunks[-2]["choices"][0]["finish_reason"] == "length"
            await home.idle()

    asyncio.run(scene())


def test_another_rank_takes_over_at_once() -> None:
    async def scene() -> None:
        question = ask(max_tokens=20)
        whole = await undisturbed(EPD, question)
        async with house(*EPD, "decode/1") as home:
            for name in ("decode/0", "decode/1"):
                home.cluster[name].script.stop_after = 4
            async with reading(home, **question) as reader:
                await reader.until(4)
                [victim] = [name for name in ("decode/0", "decode/1") if home.cluster[name].all(Decode)]
                [other] = {"decode/0", "decode/1"} - {victim}
                home.cluster[other].script.stop_after = None
                home.cluster.kill(victim)
                assert await reader.rest() == whole
            await home.idle()

    asyncio.run(scene())


def test_a_rank_that_leaves_is_avoided() -> None:
    async def scene() -> None:
        async with house(*EPD, "decode/1") as home:
            home.cluster["decode/0"].script.fail = FailureKind.RANK_LOST
            texts = {await home.text(**ask()) for _ in range(4)}
            assert len(texts) == 1
            assert count(home, "epdctl_attempts_lost_total", stage="reported") >= 1
            await home.idle()

    asyncio.run(scene())


def test_a_resumed_answer_is_counted_whole() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster["decode/0"].script.stop_after = 7
            options = {"include_usage": True}
            async with reading(home, **ask(max_tokens=20, stream_options=options)) as reader:
                await reader.until(7)
                home.cluster.kill("decode/0")
                home.cluster.up("decode/0")
                await reader.rest()
            usage = reader.chunks[-2]["usage"]
            assert usage["completion_tokens"] == 20
            assert usage["total_tokens"] == usage["prompt_tokens"] + 20

    asyncio.run(scene())


def test_a_rank_that_refuses_is_avoided_although_it_has_the_least_to_do() -> None:
    async def scene() -> None:
        async with house(*EPD, "decode/1") as home:
            leaving, busy = home.cluster["decode/0"], home.cluster["decode/1"]
            leaving.script.mute = busy.script.mute = True
            stuck = [asyncio.create_task(home.chat(**ask())) for _ in range(4)]
            [await rank.hears(Decode, 2) for rank in (leaving, busy)]
            for task, job in zip(list(stuck), leaving.all(Decode), strict=False):
                failed = Failed(request=job.request, attempt=1, kind=FailureKind.INTERNAL, text="make room")
                leaving.say(leaving.senders[0], failed)
                assert task in stuck
            await asyncio.wait(stuck, return_when=asyncio.FIRST_COMPLETED)
            leaving.script.fail, busy.script.mute = FailureKind.RANK_LOST, False
            assert await home.text(**ask())
            assert len(leaving.all(Decode)) == 3  # the two that were stuck, and one try of the last
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)
            await home.idle()

    asyncio.run(scene())


def test_an_ended_request_leaves_no_timer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer would keep the request, and so its pictures, in memory until the deadline."""
    alarms: list[asyncio.TimerHandle] = []
    landed = Pipeline.landed

    def noted(pipeline: Pipeline, flight: Flight) -> None:
        alarms.append(pipeline._alarms[flight.request])
        landed(pipeline, flight)

    monkeypatch.setattr(Pipeline, "landed", noted)

    async def scene() -> None:
        async with house(*EPD) as home:
            await home.text(**ask())
            assert [alarm.cancelled() for alarm in alarms] == [True]

    asyncio.run(scene())


def test_a_lost_token_is_asked_for_again() -> None:
    async def scene() -> None:
        question = ask(max_tokens=9)
        whole = await undisturbed(EPD, question)
        async with house(*EPD) as home:
            decode = home.cluster["decode/0"]
            decode.script.skip = 4
            asking = asyncio.create_task(home.text(**question))
            await decode.hears(Abort)
            decode.script.skip = None
            assert await asking == whole
            await home.idle()

    asyncio.run(scene())


# -- messages that come late or twice --


def test_what_is_said_twice_counts_once() -> None:
    async def scene() -> None:
        whole = await undisturbed(EPD, ask())
        async with house(*EPD) as home:
            home.cluster["decode/0"].script.double = True
            assert await home.text(**ask()) == whole

    asyncio.run(scene())


def test_words_of_an_older_attempt_are_dropped() -> None:
    async def scene() -> None:
        question = ask(max_tokens=9)
        whole = await undisturbed(EPD, question)
        async with house(*EPD) as home:
            home.cluster["prefill/0"].script.mute = True
            asking = asyncio.create_task(home.text(**question))
            decode = home.cluster["decode/0"]
            [first] = await decode.hears(Decode)
            home.cluster.kill("prefill/0")
            [abort] = await decode.hears(Abort)
            assert abort.attempt == first.attempt == 1
            sender = home.cluster.waiting(first.room).sender
            late = Token(request=first.request, attempt=1, index=0, token=5)
            decode.inbox.reply(sender, late, RANK_TO_GATEWAY)
            home.cluster.up("prefill/0")
            assert await asking == whole
            assert count(home, "epdctl_late_messages_total") == 1
            await home.idle()

    asyncio.run(scene())


def test_a_grant_of_the_wrong_size_is_our_fault() -> None:
    async def scene() -> None:
        async with house(*LANGUAGE) as home:
            language = home.cluster["language/0"]
            language.script.mute = True
            asking = asyncio.create_task(home.chat(**ask(PICTURES)))
            [asked] = await language.hears(Generate)
            granted = Granted(request=asked.request, attempt=1, slots=[], notify="ipc://none")
            language.say(language.senders[0], granted)
            response = await asking
            assert response.status_code == 502
            assert response.json()["error"]["code"] == "internal"
            await language.hears(Abort)
            await home.idle()

    asyncio.run(scene())


# -- refusals, and deadlines --

KINDS = [
    (FailureKind.BAD_MEDIA, 400, None),
    (FailureKind.TOO_LARGE, 400, None),
    (FailureKind.FULL, 429, "1"),
    (FailureKind.NO_RANK, 503, "1"),
    (FailureKind.DEADLINE, 504, None),
    (FailureKind.INTERNAL, 502, None),
]


@pytest.mark.parametrize(("ranks", "where"), [(EPD, "encoder-router/0"), (MONO, "mono/0")], ids=["router", "mono"])
@pytest.mark.parametrize("kind", [kind for kind, _, _ in KINDS])
def test_a_medium_that_is_at_fault_is_named_by_its_place(ranks: tuple[str, ...], where: str, kind: FailureKind) -> None:
    told = {"role": "system", "content": "Look."}
    content = [{"type": "text", "text": "these"}, *PICTURES]

    async def scene() -> None:
        async with house(*ranks) as home:
            rank = home.cluster[where]
            script = (rank.router if isinstance(rank, FakeMono) else rank).script
            script.fail, script.fail_item = kind, 1
            response = await home.chat(**ask(messages=[told, {"role": "user", "content": content}]))
            error = response.json()["error"]
            if kind in (FailureKind.BAD_MEDIA, FailureKind.TOO_LARGE):
                place = "messages[1].content[3].image_url.url"
                assert (error["param"], error["message"]) == (place, f"{place}: as the script says")
            else:
                assert (error["param"], error["message"]) == (None, "as the script says")
            await home.idle()

    asyncio.run(scene())


@pytest.mark.parametrize("where", ["prefill/0", "decode/0", "encoder-router/0"])
@pytest.mark.parametrize(("kind", "status", "retry_after"), KINDS, ids=[kind for kind, _, _ in KINDS])
def test_refusals_become_statuses(where: str, kind: FailureKind, status: int, retry_after: str | None) -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster[where].script.fail = kind
            response = await home.chat(**ask(PICTURES, stream=True))
            error = response.json()["error"]
            assert response.status_code == status
            assert response.headers.get("retry-after") == retry_after
            assert error["message"] == (f"{error['param']}: " if error["param"] else "") + "as the script says"
            assert error["code"] == kind.replace("-", "_")
            for name in ("prefill/0", "decode/0"):
                await home.cluster[name].hears(Abort)
            await home.cluster["encoder-router/0"].hears(CancelEncode)
            await home.idle()

    asyncio.run(scene())


def test_an_error_in_mid_stream_is_the_last_event() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            decode = home.cluster["decode/0"]
            decode.script.stop_after = 3
            async with reading(home, **ask()) as reader:
                await reader.until(3)
                [asked] = decode.all(Decode)
                failed = Failed(request=asked.request, attempt=1, kind=FailureKind.INTERNAL, text="out of luck")
                decode.say(decode.senders[0], failed)
                chunks = [*reader.chunks]
                async for line in reader._lines:
                    chunks += events(line) if line else []
            assert chunks[-1]["error"]["message"] == "out of luck"
            assert "[DONE]" not in chunks
            assert count(home, "epdctl_requests_total", status="502") == 1
            await home.idle()

    asyncio.run(scene())


def test_nobody_there_is_503_at_the_deadline() -> None:
    async def scene() -> None:
        async with house("encoder-router/0", "prefill/0", request_seconds=0.2) as home:
            response = await home.chat(**ask(PICTURES))
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            message = response.json()["error"]["message"]
            assert "no decode rank is ready" in message
            assert "no encoder rank is ready" in message
            await home.idle()

    asyncio.run(scene())


def test_a_rank_that_is_lost_for_good_is_503_and_says_so() -> None:
    async def scene() -> None:
        async with house(*EPD, request_seconds=1.0) as home:
            home.cluster["decode/0"].script.mute = True
            asking = asyncio.create_task(home.chat(**ask()))
            await home.cluster["decode/0"].hears(Decode)
            home.cluster.kill("decode/0")
            response = await asking
            assert response.status_code == 503
            assert "decode/0 was lost" in response.json()["error"]["message"]
            await home.idle()

    asyncio.run(scene())


def test_silence_is_504_at_the_deadline() -> None:
    async def scene() -> None:
        async with house(*EPD, request_seconds=0.3) as home:
            home.cluster["prefill/0"].script.mute = True
            response = await home.chat(**ask())
            assert response.status_code == 504
            assert "it was waiting for memory of decode/0 and prefill/0" in response.json()["error"]["message"]
            await home.cluster["decode/0"].hears(Abort)
            await home.idle()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("slow", "said"),
    [("encoder-router/0", "it was encoding"), ("language/0", "it was waiting for memory of language/0")],
)
def test_what_a_request_was_at_when_its_time_ended(slow: str, said: str) -> None:
    async def scene() -> None:
        async with house(*LANGUAGE, request_seconds=0.3) as home:
            home.cluster[slow].script.mute = True
            response = await home.chat(**ask(PICTURES))
            assert response.status_code == 504
            assert said in response.json()["error"]["message"]
            await home.idle()

    asyncio.run(scene())


def test_a_request_waits_for_the_rank_it_needs() -> None:
    async def scene() -> None:
        whole = await undisturbed(EPD, ask())
        async with house() as home:
            asking = asyncio.create_task(home.text(**ask()))
            await home.open_requests(1)
            home.cluster.up("prefill/0")
            home.cluster.up("decode/0")
            assert await asking == whole

    asyncio.run(scene())


# -- clients that hang up --


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_hang_up_frees_every_stage(stream: bool) -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster["decode/0"].script.stop_after = 3
            if stream:
                async with reading(home, **ask(PICTURES)) as reader:
                    await reader.until(3)
            else:
                asking = asyncio.create_task(home.chat(**ask(PICTURES)))
                await home.cluster["encoder-router/0"].hears(Encode, 2)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            for name in ("prefill/0", "decode/0"):
                await home.cluster[name].hears(Abort)
            await home.cluster["encoder-router/0"].hears(CancelEncode)
            await home.idle()
            assert count(home, "epdctl_requests_total", status="499") == 1
            assert count(home, "epdctl_media_bytes") == 0

    asyncio.run(scene())


def test_a_hang_up_while_waiting_for_a_rank() -> None:
    async def scene() -> None:
        async with house() as home:
            asking = asyncio.create_task(home.chat(**ask()))
            await home.open_requests(1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await home.idle()

    asyncio.run(scene())


# -- bounds --


@pytest.mark.parametrize(("inflight", "queue"), [(1, 0), (1, 1)])
def test_more_requests_than_are_worked_on_and_wait_are_429(inflight: int, queue: int) -> None:
    async def scene() -> None:
        async with house(*EPD, inflight=inflight, queue=queue) as home:
            home.cluster["decode/0"].script.stop_after = 1
            async with reading(home, **ask()) as reader:
                await reader.until(1)
                waiting = [asyncio.create_task(home.chat(**ask())) for _ in range(queue)]
                await home.open_requests(1 + queue)
                refused = await home.chat(**ask())
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["type"] == "rate_limit_error"
                for one in waiting:
                    one.cancel()
            await home.idle()
            home.cluster["decode/0"].script.stop_after = None
            assert await home.text(**ask())

    asyncio.run(scene())


def test_more_bytes_than_the_budget_holds_are_429() -> None:
    async def scene() -> None:
        data = picture(400, 400, "red", "BMP")
        async with house(*EPD, media_bytes=len(data) * 2) as home:
            home.cluster["decode/0"].script.stop_after = 1
            question = ask([image_part(data)])
            async with reading(home, **question) as reader:
                await reader.until(1)
                assert count(home, "epdctl_media_bytes") == len(data)  # the body is forgotten, the picture is kept
                assert (await home.chat(**question)).status_code == 429
            await home.idle()
            home.cluster["decode/0"].script.stop_after = None
            assert await home.text(**question)

    asyncio.run(scene())


def test_pauses_grow_and_end() -> None:
    assert [pause_before(losses) for losses in (0, 1, 2, 3, 4)] == [0.0, 0.0, 0.05, 0.1, 0.2]
    assert pause_before(1000) == 1.0


def test_an_idle_gateway_finds_what_was_not_given_back() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster["prefill/0"].script.mute = True
            asking = asyncio.create_task(home.chat(**ask()))
            await home.open_requests(1)
            assert home.service.pulse() == Pulse(inflight=1)
            home.service._door.held_bytes += 7
            asking.cancel()
            await home.service._door.idle.wait()
            assert home.service.pulse().unhealthy == "with nothing in flight, 7 bytes are still held"
            home.service._door.held_bytes -= 7

    asyncio.run(scene())
