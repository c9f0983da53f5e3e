"""Messages to token ids, exactly as transformers' processor does it, with tokenizers and jinja2 alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from epdctl.errors import LoadError, RequestError
from epdctl.families.files import read_json, read_json_if_there
from epdctl.gateway.schema import MediaPart, Message, TextPart
from epdctl.gateway.spelling import Spelling
from epdctl.ids import Modality

__all__ = ["ChatTemplate"]

Turn = dict[str, Any]  # a message as templates read it: JSON

# Names in config.json under which families keep the tokens that stand for media. A text must not bring its own.
MEDIA_TOKENS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
)
# How templates know a medium. Qwen2-Audio's published one looks for the address, and not at the type.
MEDIA_TURNS: Mapping[Modality, Turn] = {
    Modality.IMAGE: {"type": "image"},
    Modality.AUDIO: {"type": "audio", "audio_url": ""},
    Modality.VIDEO: {"type": "video"},
}
NORMALISING = 4  # a text may shrink this much before it is cut into tokens
HARMLESS = "x"
PROBE = "is this read?"


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which a model would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(source: str, now: Callable[[], datetime]) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment.from_string(source)


class ChatTemplate:
    """One checkpoint's tokenizer and chat template. Threads may share it."""

    def __init__(self, directory: Path, *, now: Callable[[], datetime] = datetime.now) -> None:
        """Raises LoadError for a missing or unusable tokenizer.json or template."""
        self._tokenizer = _open_tokenizer(directory / "tokenizer.json")
        self._spelling = Spelling(self._tokenizer)
        config = read_json_if_there(directory / "tokenizer_config.json")
        self._special = _special_tokens(directory, config)
        try:
            self._template = _compile(_template_source(directory, config), now)
        except jinja2.TemplateError as error:
            raise LoadError(f"the chat template in {directory} does not compile: {error}") from error
        model = read_json(directory / "config.json")
        self._media = frozenset(value for name in MEDIA_TOKENS if isinstance(value := model.get(name), int))
        self._longest = NORMALISING * max(map(len, self._tokenizer.get_vocab()), default=1)
        self._parts_only = not self._reads_strings()

    def tokens(self, messages: Sequence[Message], limit: int) -> list[int]:
        """The prompt: one placeholder per medium. Raises RequestError (400) for messages that the template refuses,
        for text that contains placeholders itself, and for text that cannot fit into ``limit`` tokens."""
        text = self._render([self._turn(message) for message in messages])
        self._refuse_endless(text, "the messages", limit)
        tokens = self._encode(text)
        self._refuse_forged(messages, tokens)
        return tokens

    def plain_tokens(self, prompt: str | Sequence[int], limit: int, *, special: bool = True) -> list[int]:
        """A prompt as it stands: no template, and no media. ``special``: a text gets the tokens that the tokenizer
        writes around one. Raises RequestError (400) as ``tokens`` does, and for ids that the tokenizer does not
        know."""
        if isinstance(prompt, str):
            self._refuse_endless(prompt, "the prompt", limit)
            prompt = self._tokenizer.encode(prompt, add_special_tokens=special).ids
        elif unknown := [token for token in prompt if token >= self.vocabulary]:
            raise RequestError(
                400, f"the prompt has a token {unknown[0]}: ids end at {self.vocabulary}", param="prompt"
            )
        if self._count_media(prompt):
            raise _forged("prompt")
        if not prompt:
            raise RequestError(400, "the prompt is empty", param="prompt")
        return list(prompt)

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def spell(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        return self._spelling.spell(token)

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens skipped."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _refuse_endless(self, text: str, what: str, limit: int) -> None:
        """Before it is cut into tokens, which takes time."""
        if len(text) > limit * self._longest:
            raise too_long(f"{what} has {len(text)} characters", limit)

    def _render(self, turns: list[Turn]) -> str:
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, documents=None, **self._special
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RequestError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def _reads_strings(self) -> bool:
        """Some templates look for a message's parts alone, and pass over a content that is a plain string."""
        try:
            return PROBE in self._render([{"role": "user", "content": PROBE}])
        except RequestError:
            return False

    def _turn(self, message: Message, words: str | None = None) -> Turn:
        """``words`` in place of every text, if given. Templates know no developer: the role's old name is system."""
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            text = message.content if words is None else words
            return {"role": role, "content": [_text(text)] if self._parts_only else text}
        return {"role": role, "content": [_part(part, words) for part in message.content]}

    def _encode(self, text: str) -> list[int]:
        bos = self._special.get("bos_token")
        twice = bos is not None and text.startswith(bos)
        return self._tokenizer.encode(text, add_special_tokens=not twice).ids

    def _refuse_forged(self, messages: Sequence[Message], tokens: Sequence[int]) -> None:
        """Media tokens may come from the template alone: as many as with harmless words in place of the client's."""
        harmless = self._render([self._turn(message, HARMLESS) for message in messages])
        if self._count_media(tokens) != self._count_media(self._encode(harmless)):
            raise _forged("messages")

    def _count_media(self, tokens: Sequence[int]) -> Counter[int]:
        return Counter(token for token in tokens if token in self._media)


def _forged(param: str) -> RequestError:
    text = "a text contains the model's own marks for media: send media as parts of their own"
    return RequestError(400, text, param=param, code="forged_media")


def too_long(what: str, limit: int, param: str = "messages") -> RequestError:
    return RequestError(
        400,
        f"{what}; prompt and answer together may have {limit} tokens",
        param=param,
        code="context_length_exceeded",
    )


def _part(part: TextPart | MediaPart, words: str | None) -> Turn:
    if isinstance(part, MediaPart):
        return MEDIA_TURNS[part.modality]
    return _text(part.text if words is None else words)


def _text(text: str) -> Turn:
    return {"type": "text", "text": text}


def _open_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise LoadError(
            f"{path}: {error}", hint="the gateway needs a tokenizer.json, as fast tokenizers have"
        ) from error


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """What templates may name: bos_token, eos_token, … as texts."""
    named = {**read_json_if_there(directory / "special_tokens_map.json"), **config}
    texts = {name: _token_text(value) for name, value in named.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(value: object) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template_source(directory: Path, config: dict[str, Any]) -> str:
    """In transformers' order: a file of its own, the processor's, the tokenizer's."""
    own = directory / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    for source in (read_json_if_there(directory / "chat_template.json"), config):
        text = _default_template(source.get("chat_template"))
        if text is not None:
            return text
    raise LoadError(
        f"{directory} has no chat template",
        hint="looked for chat_template.jinja, chat_template.json, tokenizer_config.json",
    )


def _default_template(value: object) -> str | None:
    """A template, or a list of named ones."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
