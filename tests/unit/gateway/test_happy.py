"""Requests that find everything in order."""

from __future__ import annotations

import asyncio

import pytest

from epdctl.gateway.flight import Flight
from epdctl.gateway.intake import DEFAULT_ANSWER_TOKENS
from epdctl.gateway.pipeline import Pipeline
from epdctl.gateway.states import RequestState
from epdctl.wire.encode import Encode
from epdctl.wire.serve import Abort, Decode, Generate, Prefill
from tests.support.fake_ranks import answer
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

RED, BLUE = picture(56, 56, "red"), picture(112, 84, "blue")


def expected(house: House, tokens: list[int], pictures: list[bytes], count: int) -> str:
    import hashlib

    hashes = [hashlib.sha256(data).hexdigest() for data in pictures]
    return house.tokenizer.decode(answer(tokens, hashes, count, house.cluster.vocabulary))


@pytest.mark.parametrize("ranks", [EPD, LANGUAGE, MONO], ids=["epd", "language", "mono"])
def test_an_answer_is_what_the_ranks_said(ranks: tuple[str, ...]) -> None:
    async def scene() -> None:
        async with house(*ranks) as home:
            response = await home.chat(**ask([image_part(RED), {"type": "text", "text": "or"}, image_part(BLUE)]))
            body = response.json()
            assert response.status_code == 200, body
            [asked] = home.cluster["prefill/0"].all(Prefill) if ranks == EPD else home.cluster[ranks[-1]].all(Generate)
            assert body["choices"][0]["message"]["content"] == expected(home, asked.tokens, [RED, BLUE], 12)
            assert body["choices"][0]["finish_reason"] == "length"
            assert body["usage"]["prompt_tokens"] == len(asked.tokens)
            assert body["usage"]["completion_tokens"] == 12
            assert body["usage"]["total_tokens"] == len(asked.tokens) + 12
            assert (body["object"], body["model"], body["resumes"]) == ("chat.completion", "tiny", 0)
            assert home.cluster.pictures == [RED, BLUE]  # untouched, in order
            await home.idle()

    asyncio.run(scene())


def test_items_carry_what_the_header_says() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            await home.text(**ask([image_part(RED), image_part(BLUE)]))
            [first, second] = home.cluster["encoder-router/0"].all(Encode)
            [prefill] = home.cluster["prefill/0"].all(Prefill)
            [decode] = home.cluster["decode/0"].all(Decode)
            assert (first.item.grid, first.item.rows, first.item.of) == ([1, 4, 4], 4, 2)
            assert (second.item.grid, second.item.rows, second.item.index) == ([1, 6, 8], 12, 1)
            assert [one.slot and one.slot.lease for one in (first, second)] == [0, 1]
            assert [item.rows for item in prefill.items] == [4, 12]
            assert decode.prompt_tokens == len(prefill.tokens)
            assert decode.room == prefill.room
            assert prefill.decode_at.rank == "decode/0"
            assert decode.prefill_at.rank == "prefill/0"
            assert 0 < prefill.budget_s <= 300

    asyncio.run(scene())


def test_a_stream_has_openai_s_shape() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            whole = await home.text(**ask())
            response = await home.chat(**ask(stream=True, stream_options={"include_usage": True}))
            chunks = events(response.text)
            assert response.headers["content-type"].startswith("text/event-stream")
            assert chunks[-1] == "[DONE]"
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert streamed_text(chunks) == whole
            assert chunks[-3]["choices"][0]["finish_reason"] == "length"
            assert chunks[-3]["choices"][0]["delta"] == {}
            assert chunks[-2]["choices"] == []
            assert chunks[-2]["usage"]["completion_tokens"] == 12
            assert all(chunk["usage"] is None for chunk in chunks[:-2])
            assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
            assert chunks[0]["id"] == response.headers["x-request-id"]
            bare = events((await home.chat(**ask(stream=True))).text)
            assert not any("usage" in chunk for chunk in bare[:-1])
            await home.idle()

    asyncio.run(scene())


def test_stop_strings_cut_the_answer_and_free_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[RequestState] = []
    landed = Pipeline.landed

    def noted(pipeline: Pipeline, flight: Flight) -> None:
        ends.append(flight.state)
        landed(pipeline, flight)

    monkeypatch.setattr(Pipeline, "landed", noted)

    async def scene() -> None:
        async with house(*EPD) as home:
            whole = await home.text(**ask(max_tokens=40))
            stop = whole[5:8]
            home.cluster["decode/0"].script.stop_after = 20  # it never ends by itself: only the stop string can
            response = (await home.chat(**ask(max_tokens=40, stop=[stop, "never said"]))).json()
            assert response["choices"][0]["message"]["content"] == whole[: whole.index(stop)]
            assert response["choices"][0]["finish_reason"] == "stop"
            assert response["usage"]["completion_tokens"] <= 8
            chunks = events((await home.chat(**ask(max_tokens=40, stop=stop, stream=True))).text)
            assert streamed_text(chunks) == whole[: whole.index(stop)]
            await home.cluster["decode/0"].hears(Abort, 2)
            assert ends == [RequestState.FINISHED] * 3
            await home.idle()

    asyncio.run(scene())


def test_the_model_s_own_end_is_a_stop() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster["decode/0"].script.end_after = 3
            body = (await home.chat(**ask())).json()
            assert body["choices"][0]["finish_reason"] == "stop"
            assert body["usage"]["completion_tokens"] == 4  # the end token counts, and is not text
            home.cluster["decode/0"].script.end_after = 0
            assert (await home.chat(**ask())).json()["choices"][0]["message"]["content"] == ""
            chunks = events((await home.chat(**ask(stream=True))).text)
            assert (streamed_text(chunks), chunks[-1]) == ("", "[DONE]")

    asyncio.run(scene())


def test_sampling_reaches_the_ranks() -> None:
    async def scene() -> None:
        async with house(*LANGUAGE, max_context=4096) as home:
            language = home.cluster["language/0"]
            await home.text(
                **ask(temperature=0.5, top_p=0.9, top_k=7, seed=-1, ignore_eos=True, max_completion_tokens=12)
            )
            sampling = language.all(Generate)[0].sampling
            assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
            assert (sampling.seed, sampling.stop_token_ids, sampling.max_tokens) == (2**63 - 1, [], 12)
            await home.text(model="tiny", messages=[{"role": "user", "content": "x"}])
            bare = language.all(Generate)[1].sampling
            assert (bare.temperature, bare.top_p, bare.max_tokens) == (1.0, 1.0, DEFAULT_ANSWER_TOKENS)
            assert bare.stop_token_ids == [home.tokenizer.token_to_id("<|im_end|>")]

    asyncio.run(scene())


def test_work_goes_to_the_least_loaded_rank() -> None:
    async def scene() -> None:
        async with house(*EPD, "decode/1", "prefill/1") as home:
            for name in ("decode/0", "decode/1"):
                home.cluster[name].script.stop_after = 1
            asking = [asyncio.create_task(home.chat(**ask())) for _ in range(6)]
            for name, kind in (
                ("decode/0", Decode),
                ("decode/1", Decode),
                ("prefill/0", Prefill),
                ("prefill/1", Prefill),
            ):
                assert len(await home.cluster[name].hears(kind, 3)) == 3
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            await home.idle()

    asyncio.run(scene())


def test_many_at_once_each_get_their_own_answer() -> None:
    async def scene() -> None:
        async with house(*EPD, "decode/1", "language/0") as home:
            questions = [
                ask(f"question {number}", max_tokens=5 + number, stream=bool(number % 2)) for number in range(16)
            ]
            alone = [await home.text(**{**question, "stream": False}) for question in questions]
            answers = await asyncio.gather(*(home.chat(**question) for question in questions))
            for question, response, text in zip(questions, answers, alone, strict=True):
                got = (
                    streamed_text(events(response.text))
                    if question["stream"]
                    else response.json()["choices"][0]["message"]["content"]
                )
                assert got == text
            await home.idle()

    asyncio.run(scene())


@pytest.mark.parametrize("stop", [None, "zz"], ids=["whole", "stopped"])
def test_token_ids_where_they_are_asked_for(stop: str | None) -> None:
    """The ids, decoded, are the text, and those after a stop string are not given."""

    async def scene() -> None:
        async with house(*EPD) as home:
            plain = (await home.chat(**ask(max_tokens=40))).json()
            assert "token_ids" not in plain["choices"][0]
            text = plain["choices"][0]["message"]["content"]
            stop_at = None if stop is None else text[6:8]
            asked = ask(max_tokens=40, return_token_ids=True, stop=stop_at)
            choice = (await home.chat(**asked)).json()["choices"][0]
            said = home.tokenizer.decode(choice["token_ids"])
            assert said == (text if stop_at is None else text[: text.index(stop_at) + 2])
            chunks = events((await home.chat(**{**asked, "stream": True})).text)
            ids = [token for chunk in chunks[:-1] for token in chunk["choices"][0].get("token_ids", [])]
            assert ids == choice["token_ids"]

    asyncio.run(scene())


def test_ignored_fields_are_named_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            known = {"user": "me", "metadata": {"a": "b"}, "tools": []}
            for _ in range(2):
                response = await home.chat(**ask([{**image_part(picture()), "x": 1}], **known, **{"odd\r\nname": 1}))
                assert response.status_code == 200
                assert response.headers["x-epdctl-ignored"] == "messages.content.x,odd??name"
            assert caplog.text.count("odd??name") == 1
            assert "x-epdctl-ignored" not in (await home.chat(**ask(**known))).headers

    asyncio.run(scene())
