"""Every field that a client may have read about: implemented, refused by name, or taken; none is unknown."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as openai_text
from openai.types.chat import completion_create_params as openai_chat
from pydantic import BaseModel
from tokenizers import processors
from typing_extensions import get_type_hints, is_typeddict

from epdctl.errors import RequestError
from epdctl.gateway.chat import ChatTemplate
from epdctl.gateway.fields import Incoming, Settings
from epdctl.gateway.intake import Intake
from epdctl.gateway.schema import ChatRequest, TextRequest
from epdctl.wire.config import Limits, ModelConfig
from tests.unit.gateway.harness import ask, image_part, picture
from tests.unit.gateway.model_files import write_model_files

# -- OpenAI's, as its own client has them --


def within(hint: object) -> Iterator[type]:
    """The types that a hint is made of."""
    for argument in typing.get_args(hint):
        yield from within(argument)
    if isinstance(hint, type):
        yield hint


def kinds(hints: dict[str, Any]) -> set[str]:
    """What tells one message, or part, from another."""
    return {value for name in ("role", "type") if name in hints for value in typing.get_args(hints[name])}


def unknown(theirs: type, ours: type[Incoming], path: str = "") -> Iterator[str]:
    """Fields of ``theirs`` that nobody here knows; a whole message or part that is none of ours begins with a #."""
    for name, hint in get_type_hints(theirs).items():
        if name in ours.refused or name in ours.taken:
            continue
        if name not in ours.model_fields:
            yield f"{path}{name}"
            continue
        served = [each for each in within(ours.model_fields[name].annotation) if issubclass(each, Incoming)]
        for each in filter(is_typeddict, within(hint)):
            kind = kinds(get_type_hints(each))
            same = [model for model in served if kind == set() or kind & kinds(get_type_hints(model))]
            if not same:
                yield f"#{'/'.join(kind)}"
            for model in same:
                yield from unknown(each, model, f"{path}{name}.")


@pytest.mark.parametrize("stream", ["NonStreaming", "Streaming"])
def test_every_field_of_openais_client_is_known(stream: str) -> None:
    """Messages and parts that nobody here takes are refused for what they are."""
    chat = set(unknown(getattr(openai_chat, f"CompletionCreateParams{stream}"), ChatRequest))
    assert chat == {"#tool", "#function", "#file", "#refusal"}
    assert set(unknown(getattr(openai_text, f"CompletionCreateParams{stream}"), TextRequest)) == set()


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Intake:
    directory = tmp_path_factory.mktemp("m")
    write_model_files(directory)
    return Intake(ModelConfig(path=str(directory), name="tiny", family="qwen2_5_vl"), Limits())


def with_part(part: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return ask([part, {"type": "text", "text": "x"}], **fields)


def with_image(**fields: Any) -> dict[str, Any]:
    part = image_part(picture())
    return with_part({**part, "image_url": {**part["image_url"], **fields}})


TEXT = {"type": "text", "text": "x"}
KNOWN: dict[str, dict[str, Any]] = {
    "a name": ask(messages=[{"role": "user", "name": "me", "content": "x"}]),
    "low detail": with_image(detail="low"),
    "high detail": with_image(detail="high"),
    "obfuscation": ask(stream=True, stream_options={"include_obfuscation": False}),
    "a cache's hints": with_part({**TEXT, "prompt_cache_breakpoint": {"mode": "explicit"}}, prompt_cache_options={}),
    "what is the rule": ask(separate_reasoning=True, include_reasoning=True, min_new_tokens=0, request_id="me"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_changes_no_answer_is_taken(intake: Intake, name: str) -> None:
    assert intake.read(ChatRequest, json.dumps(KNOWN[name]).encode(), strict=True).ignored_fields == []


UNSERVED: dict[str, Any] = {
    "moderation": {"model": "omni-moderation-latest"},
    # vLLM's
    "media_io_kwargs": {"video": {"num_frames": 8}},
    "prompt_embeds": "AAAA",
    "thinking_token_budget": 100,
    "guided_whitespace_pattern": " ",
    "logprob_token_ids": [1],
    "include_reasoning": "yes",
    "repetition_detection": {"max_pattern_size": 4},
    # SGLang's
    "input_ids": [1, 2],
    "min_new_tokens": 4,
    "custom_params": {"a": 1},
    "max_dynamic_patch": 6,
    "separate_reasoning": "yes",
    "return_meta_info": True,
    "structural_tag": {"triggers": []},
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_would_change_the_answer_is_refused_by_name(intake: Intake, name: str) -> None:
    value = UNSERVED[name]
    for kind, body in (ChatRequest, ask(**{name: value})), (TextRequest, {"model": "tiny", "prompt": "x", name: value}):
        with pytest.raises(RequestError, match=name) as caught:
            intake.read(kind, json.dumps(body).encode())
        assert (caught.value.status, caught.value.param) == (400, name)


BELOW: dict[str, tuple[dict[str, Any], str]] = {
    "patches of a picture": (with_image(max_dynamic_patch=6), "max_dynamic_patch"),
    "pictures as a video": (with_part({**image_part(picture()), "modalities": "video"}), "modalities"),
    "thoughts": (ask(messages=[{"role": "assistant", "content": "x", "reasoning_content": "hm"}]), "reasoning_content"),
    "another detail": (with_image(detail="finest"), "messages[0].content[0].image_url.detail"),
    "a tool's answer": (ask(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]), "messages[0].role"),
    "a file": (with_part({"type": "file", "file": {"file_id": "x"}}), "messages[0].content[0]"),
}


@pytest.mark.parametrize("name", BELOW)
def test_so_it_is_below_the_top(intake: Intake, name: str) -> None:
    body, param = BELOW[name]
    with pytest.raises(RequestError) as caught:
        intake.read(ChatRequest, json.dumps(body).encode())
    assert (caught.value.status, caught.value.param) == (400, param)


def models_below(model: type[BaseModel]) -> Iterator[type[Incoming]]:
    for field in model.model_fields.values():
        for each in within(field.annotation):
            if issubclass(each, Incoming):
                yield each
                yield from models_below(each)


def test_no_field_is_both_served_and_not() -> None:
    for kind in (ChatRequest, TextRequest):
        assert issubclass(kind, Settings)
        for model in (kind, *models_below(kind)):
            tables = [set(model.model_fields), set(model.refused), set(model.taken)]
            assert sum(map(len, tables)) == len(set.union(*tables)), model


# -- special tokens of plain text --


def test_a_plain_text_has_its_special_tokens_unless_told_otherwise(tmp_path: Path) -> None:
    tokenizer = write_model_files(tmp_path)
    first = "<|endoftext|>"
    ids = tokenizer.encode("the quick").ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    intake = Intake(ModelConfig(path=str(tmp_path), name="tiny", family="qwen2_5_vl"), Limits())
    assert isinstance(intake.chat, ChatTemplate)
    for given, found in (
        ({}, [tokenizer.token_to_id(first), *ids]),
        ({"add_special_tokens": True}, [tokenizer.token_to_id(first), *ids]),
        ({"add_special_tokens": False}, ids),
    ):
        body = json.dumps({"model": "tiny", "prompt": "the quick", **given}).encode()
        assert intake.order(intake.read(TextRequest, body, strict=True), {}).prompt.tokens == found
