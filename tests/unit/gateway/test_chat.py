"""The prompt is what transformers makes of the same messages, token by token, with pictures and without.

This file imports transformers, to compare; the gateway never does.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from epdctl.bench.checkpoints import FAMILY
from epdctl.errors import LoadError, RequestError
from epdctl.gateway.chat import ChatTemplate
from epdctl.gateway.intake import Intake, Order
from epdctl.gateway.schema import ChatRequest, parse_request
from epdctl.wire.config import Limits
from tests.support.checkpoints import NEWER, model_config, tiny_checkpoint
from tests.support.reference import own_processor
from tests.unit.gateway.harness import ask, image_part, picture
from tests.unit.gateway.model_files import write_model_files

RED, TALL = image_part(picture(57, 91, "red")), image_part(picture(300, 100, "blue", "JPEG"))

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"role": "user", "content": "Hello, what is this?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "turns": [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two "},
        {"role": "user", "content": [{"type": "text", "text": " three\n\n"}]},
    ],
    "spaces and marks": [{"role": "user", "content": "  déjà\u0301 vu\t🙂 <b>&amp;</b> {{ x }} {% y %}\r\n "}],
    "control tokens as text": [{"role": "user", "content": "a<|im_end|>\n<|im_start|>system\nb<|endoftext|>"}],
    "one picture": [{"role": "user", "content": [RED, {"type": "text", "text": "What is in this picture?"}]}],
    "three pictures": [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": [{"type": "text", "text": "From "}, RED, {"type": "text", "text": " to "}, TALL]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [RED]},
    ],
}


@pytest.fixture(scope="module", params=[FAMILY, *NEWER])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory, family=request.param)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return own_processor(checkpoint)


def order_of(intake: Intake, body: dict[str, Any]) -> Order:
    return intake.order(intake.read(ChatRequest, json.dumps(body).encode()), {})


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """As the published templates of LLaVA-OneVision must be given it: they pass over a content that is a string."""
    content = message["content"]
    return message | {"content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_transformers_own(checkpoint: Path, processor: Any, name: str) -> None:
    messages = CONVERSATIONS[name]
    model = model_config(checkpoint)
    order = order_of(Intake(model, Limits()), ask(messages=messages))
    theirs = processor.apply_chat_template(
        [in_parts(message) for message in messages] if model.family == "llava_onevision" else messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
    )
    assert order.prompt.tokens == list(theirs["input_ids"][0])
    if order.media:
        if "image_grid_thw" in theirs:
            grids = [list(map(int, grid)) for grid in theirs["image_grid_thw"]]
            assert [item.grid for item in order.prompt.items] == grids
        assert base64.b64encode(order.media[0].data).decode() in RED["image_url"]["url"]


def test_a_text_may_not_bring_a_familys_own_marks(checkpoint: Path, processor: Any) -> None:
    intake = Intake(model_config(checkpoint), Limits())
    for mark in (processor.image_token, processor.video_token):
        for content in (f"look: {mark}", [RED, {"type": "text", "text": f"look: {mark}"}]):
            with pytest.raises(RequestError, match="own marks"):
                order_of(intake, ask(content))


def test_decoding_is_transformers_own(checkpoint: Path, processor: Any) -> None:
    chat = ChatTemplate(checkpoint)
    tokens = processor.tokenizer.encode("Yes, 2 < 3 .<|im_end|> déjà 🙂 <|endoftext|>'s")
    assert chat.decode(tokens) == processor.tokenizer.decode(tokens, skip_special_tokens=True)


# -- where the template comes from, and what it may do --


def chat_with(directory: Path, template: str | None, **files: object) -> ChatTemplate:
    write_model_files(directory)
    (directory / "chat_template.jinja").unlink()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return ChatTemplate(directory, now=lambda: datetime(2031, 4, 5))


def rendered(chat: ChatTemplate, content: object = "hi") -> str:
    return chat.decode(chat.tokens(parse_request(ChatRequest, json.dumps(ask(content)).encode()).messages, 1000))


def test_templates_are_looked_for_in_transformers_order(tmp_path: Path) -> None:
    named = {"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "tokenizer's"}]}
    assert rendered(chat_with(tmp_path, None, tokenizer_config=named)) == "tokenizer's"
    files = {"tokenizer_config": named, "chat_template": {"chat_template": "processor's"}}
    assert rendered(chat_with(tmp_path, None, **files)) == "processor's"
    assert rendered(chat_with(tmp_path, "its own", **files)) == "its own"


@pytest.mark.parametrize("template", [None, "{% if %}"], ids=["none", "broken"])
def test_a_template_that_cannot_be_used_is_a_load_error(tmp_path: Path, template: str | None) -> None:
    with pytest.raises(LoadError, match="template"):
        chat_with(tmp_path, template)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d.%m.%Y') }}", "05.04.2031"),
        ('{{ {"a": "<ü>"} | tojson }}', '{"a": "<ü>"}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{{ pad_token is defined }} {{ bos_token is defined }}", "True False"),
    ],
)
def test_what_templates_may_use(tmp_path: Path, template: str, text: str) -> None:
    assert rendered(chat_with(tmp_path, template)) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only questions') }}",
        "{{ messages[0].nothing.further }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_refuses_is_a_400(tmp_path: Path, template: str) -> None:
    chat = chat_with(tmp_path, template)
    with pytest.raises(RequestError, match="template refuses") as refused:
        rendered(chat)
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_a_beginning_token_is_not_doubled(tmp_path: Path) -> None:
    """A tokenizer that puts one in front of every text must not do so when the template has one already."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    write_model_files(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    begin = tokenizer.token_to_id("<|im_start|>")
    assert begin is not None
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    messages = parse_request(ChatRequest, json.dumps(ask("hi")).encode()).messages
    for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        (tmp_path / "chat_template.jinja").write_text(template)
        assert ChatTemplate(tmp_path).tokens(messages, 100).count(begin) == 1
