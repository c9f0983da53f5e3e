"""Log-probabilities, text completions and settings, from HTTP to the ranks and back: the ranks are scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from epdctl.errors import RequestError
from epdctl.gateway.intake import Intake
from epdctl.gateway.schema import ChatRequest
from epdctl.wire.config import Limits, ModelConfig
from epdctl.wire.serve import Decode, Generate, Prefill
from tests.support.fake_ranks import Answering
from tests.unit.gateway.harness import EPD, LANGUAGE, ask, events, house, streamed_text
from tests.unit.gateway.model_files import write_model_files

LOGPROBS = {"logprobs": True, "top_logprobs": 2}


def completion(prompt: object = "the quick", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}


def likely_in(choices: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What all chunks tell of their tokens."""
    told = [choice["logprobs"] for found in choices for choice in found]
    return [each for logprobs in told if logprobs is not None for each in logprobs["content"]]


def assert_spells(content: list[dict[str, Any]], text: str) -> None:
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == text
    for each in content:
        assert bytes(each["bytes"]).decode(errors="replace") == each["token"]
        assert each["logprob"] < 0
        assert each["top_logprobs"][0]["token"] == each["token"]
        assert len(each["top_logprobs"]) == 2


def test_every_setting_reaches_the_rank() -> None:
    async def scene() -> None:
        async with house(*LANGUAGE) as home:
            wanted = {
                "min_p": 0.1,
                "presence_penalty": 0.5,
                "frequency_penalty": -0.5,
                "repetition_penalty": 1.5,
                "min_tokens": 3,
            }
            await home.text(**ask(**wanted, logit_bias={"7": 2}, stop_token_ids=[5], **LOGPROBS))
            (generate,) = home.cluster["language/0"].all(Generate)
            sampling = generate.sampling
            assert {name: getattr(sampling, name) for name in wanted} == wanted
            assert sampling.logit_bias == {7: 2.0}
            assert sampling.stop_token_ids[-1] == 5
            assert len(sampling.stop_token_ids) == 2
            assert sampling.logprobs == 2
            assert sampling.answer_from == len(generate.tokens)

    asyncio.run(scene())


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_decode_learns_the_prompt_only_where_a_penalty_reads_it(penalty: str) -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            await home.text(**ask())
            await home.text(**ask(**{penalty: 1.5}))
            plain, penalised = home.cluster["decode/0"].all(Decode)
            assert plain.tokens == []
            assert penalised.tokens == home.cluster["prefill/0"].all(Prefill)[1].tokens

    asyncio.run(scene())


def test_what_a_lost_attempt_answered_stays_part_of_the_answer() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            decode = home.cluster["decode/0"]
            assert isinstance(decode, Answering)
            decode.script.stop_after = 5
            body = ask(stream=True, presence_penalty=1.0, min_tokens=9, **LOGPROBS)
            read: list[str] = []
            async with home.http.stream("POST", "/v1/chat/completions", json=body) as reply:
                async for line in reply.aiter_lines():
                    read.append(line)
                    if '"content":[{"token"' in line and "decode/0" in home.cluster.ranks and decode.stopped:
                        home.cluster.kill("decode/0")
                        home.cluster.up("decode/0")
                        decode.stopped.clear()
            chunks = events("\n\n".join(line for line in read if line))
            assert chunks[-2]["resumes"] == 1
            first, second = home.cluster["prefill/0"].all(Prefill)
            assert first.sampling.answer_from == second.sampling.answer_from == len(first.tokens)
            assert second.sampling.min_tokens == 9
            (again,) = home.cluster["decode/0"].all(Decode)
            assert again.tokens == second.tokens
            content = likely_in(chunk["choices"] for chunk in chunks[:-1])
            assert len(content) == 12
            assert_spells(content, streamed_text(chunks))

    asyncio.run(scene())


@pytest.mark.parametrize("lost", [False, True])
def test_no_stop_string_ends_within_the_first_min_tokens(lost: bool) -> None:
    """Nor does one when those tokens are of two attempts."""

    async def scene() -> None:
        async with house(*EPD) as home:
            text = await home.text(**ask())  # a letter of each token
            decode = home.cluster["decode/0"]
            assert isinstance(decode, Answering)
            decode.script.stop_after = 5 if lost else None
            stops = [text[2:4], text[9:11]]
            asking = asyncio.create_task(home.chat(**ask(stop=stops, min_tokens=8)))
            if lost:
                await decode.reaches(5)
                home.cluster.kill("decode/0")
                home.cluster.up("decode/0")
            reply = (await asking).json()
            end = next(end for end in range(9, 13) if any(text[:end].endswith(stop) for stop in stops))
            assert reply["choices"][0]["message"]["content"] == text[: end - 2]
            assert (reply["choices"][0]["finish_reason"], reply["resumes"]) == ("stop", int(lost))

    asyncio.run(scene())


def test_logprobs_spell_the_answer_whole_and_streamed() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            whole = (await home.chat(**ask(**LOGPROBS))).json()["choices"][0]
            assert_spells(whole["logprobs"]["content"], whole["message"]["content"])
            chunks = events((await home.chat(**ask(stream=True, **LOGPROBS))).text)
            assert likely_in(chunk["choices"] for chunk in chunks[:-1]) == whole["logprobs"]["content"]
            assert streamed_text(chunks) == whole["message"]["content"]
            bare = (await home.chat(**ask(logprobs=True))).json()["choices"][0]["logprobs"]["content"]
            assert [each["top_logprobs"] for each in bare] == [[]] * 12
            assert (await home.chat(**ask())).json()["choices"][0]["logprobs"] is None

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_logprobs_with_the_text(stream: bool) -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            text = await home.text(**ask())
            stop = text[5:8]
            cut = text[: text.find(stop)]
            reply = await home.chat(**ask(stop=stop, stream=stream, **LOGPROBS))
            choices = [each["choices"] for each in events(reply.text)[:-1]] if stream else [reply.json()["choices"]]
            content = likely_in(choices)
            assert bytes(byte for each in content for byte in each["bytes"]).decode() == cut

    asyncio.run(scene())


def test_text_completions_answer_as_openais() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            reply = await home.http.post("/v1/completions", json=completion(logprobs=2))
            assert reply.status_code == 200, reply.text
            body = reply.json()
            assert body["object"] == "text_completion"
            assert body["id"].startswith("cmpl-")
            choice, usage = body["choices"][0], body["usage"]
            logprobs = choice["logprobs"]
            assert "".join(logprobs["tokens"]) == choice["text"]
            assert [choice["text"][at:].startswith(token) for at, token in offsets(logprobs)] == [True] * 8
            pairs = list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
            assert all(token in top for token, top in pairs)
            assert all(len(top) == 2 for _, top in pairs)
            ids = home.tokenizer.encode("the quick").ids
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 8)
            assert home.cluster["prefill/0"].all(Prefill)[0].tokens == ids
            for prompt in (ids, [ids], ["the quick"]):
                again = await home.http.post("/v1/completions", json=completion(prompt))
                assert again.json()["choices"][0]["text"] == choice["text"]
            streamed = await home.http.post(
                "/v1/completions", json=completion(stream=True, stream_options={"include_usage": True})
            )
            chunks = events(streamed.text)
            assert "".join(each["text"] for chunk in chunks[:-1] for each in chunk["choices"]) == choice["text"]
            assert chunks[-2]["usage"] == usage
            assert chunks[-3]["choices"][0]["finish_reason"] == "length"

    asyncio.run(scene())


def test_the_alternatives_of_text_hold_the_sampled_token_too() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            decode = home.cluster["decode/0"]
            for unlikely, count in ((False, 2), (True, 3)):
                decode.script.unlikely = unlikely
                reply = await home.http.post("/v1/completions", json=completion(logprobs=2))
                logprobs = reply.json()["choices"][0]["logprobs"]
                told = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
                assert len(told) == 8
                assert all(top[token] == logprob for token, logprob, top in told)
                assert all(len(top) == count for *_, top in told)
                assert all(list(top.values()) == sorted(top.values(), reverse=True) for *_, top in told)

    asyncio.run(scene())


def offsets(logprobs: dict[str, Any]) -> list[tuple[int, str]]:
    return list(zip(logprobs["text_offset"], logprobs["tokens"], strict=True))


BAD_PROMPTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "two prompts": (completion(["a", "b"]), "prompt", "at most 1"),
    "two lists": (completion([[1], [2]]), "prompt", "at most 1"),
    "nothing": (completion([]), "prompt", "at least 1"),
    "an empty text": (completion(""), "prompt", "empty"),
    "an id beyond the vocabulary": (completion([99999]), "prompt", "99999"),
    "a negative id": (completion([-1]), "prompt[0]", "0"),
    "a number": (completion(5), "prompt", "string"),
    "a forged picture": (completion("<|image_pad|>"), "prompt", "own marks"),
    "an echo": (completion(echo=True), "echo", "not served"),
    "a suffix": (completion(suffix="x"), "suffix", "not served"),
    "best of three": (completion(best_of=3), "best_of", "not served"),
    "logprobs as chat has them": (completion(logprobs=True), "logprobs", "integer"),
    "too long": (completion("word " * 9000, max_tokens=8), "messages", "tokens"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_text_requests_are_refused(name: str) -> None:
    body, param, piece = BAD_PROMPTS[name]

    async def scene() -> None:
        async with house(*EPD, max_context=1000) as home:
            reply: httpx.Response = await home.http.post("/v1/completions", json=body)
            error = reply.json()["error"]
            assert (reply.status_code, error["param"]) == (400, param), reply.text
            assert piece in error["message"]
            assert not home.cluster["prefill/0"].heard

    asyncio.run(scene())


def test_a_developer_is_the_system() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            for role in ("system", "developer"):
                await home.text(
                    **ask(messages=[{"role": role, "content": "be kind"}, {"role": "user", "content": "x"}])
                )
            one, other = home.cluster["prefill/0"].all(Prefill)
            assert one.tokens == other.tokens

    asyncio.run(scene())


def test_strict_refuses_what_nobody_knows(tmp_path: Path) -> None:
    write_model_files(tmp_path)
    intake = Intake(ModelConfig(path=str(tmp_path), name="tiny", family="qwen2_5_vl"), Limits())
    for body, name in (
        (ask(colour="red"), "colour"),
        (ask([{"type": "text", "text": "x", "y": 1}]), "messages.content.y"),
    ):
        raw = json.dumps(body).encode()
        assert intake.read(ChatRequest, raw).ignored_fields == [name]
        with pytest.raises(RequestError) as caught:
            intake.read(ChatRequest, raw, strict=True)
        assert (caught.value.status, caught.value.param) == (400, name)
    known = ask(user="me", metadata={}, min_p=0.1)
    assert intake.read(ChatRequest, json.dumps(known).encode(), strict=True).ignored_fields == []
