"""From the bytes of a body to an Order: everything about a request that is known before any rank is asked.

Runs on a thread of a bounded pool; touches no socket, no shared state.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from epdctl.errors import RequestError
from epdctl.families import open_family
from epdctl.families.base import Family, Prompt, Span
from epdctl.gateway.chat import ChatTemplate, too_long
from epdctl.gateway.fields import Settings
from epdctl.gateway.remote import is_remote
from epdctl.gateway.schema import PARTS, ChatRequest, MediaPart, Message, TextRequest, parse_request
from epdctl.rank.media import Medium, Source, measure, read, span_of
from epdctl.wire.config import Limits, ModelConfig
from epdctl.wire.encode import MediaItem
from epdctl.wire.serve import Sampling

__all__ = ["DEFAULT_ANSWER_TOKENS", "Intake", "Order", "remote_urls"]

# Ranks set memory aside for the whole answer, so "until the context ends" would let few requests in at a time.
DEFAULT_ANSWER_TOKENS = 1024
SEED_BITS = 63

R = TypeVar("R", bound=Settings)


@dataclass(frozen=True, slots=True)
class Order:
    """One request, bounded and tokenised. ``media[i]`` is that of ``prompt.items[i]``, and stood at ``places[i]``."""

    prompt: Prompt
    media: Sequence[Medium]
    places: Sequence[str]
    sampling: Sampling

    @property
    def media_bytes(self) -> int:
        return sum(len(medium.data) for medium in self.media)

    def media_item(self, index: int) -> MediaItem:
        item = self.prompt.items[index]
        return MediaItem(
            index=index,
            modality=item.modality,
            content_hash=self.media[index].content_hash,
            of=sum(other.modality == item.modality for other in self.prompt.items),
            grid=item.grid,
            rows=item.rows,
        )


class Intake:
    """The model's tokenizer, template and sizes, and the limits of this cluster. Threads may share it."""

    def __init__(self, model: ModelConfig, limits: Limits, *, sees: bool = True) -> None:
        """Reads the checkpoint's small files; raises LoadError. ``sees``: the cluster was made to take media."""
        directory = Path(model.path)
        self.limits = limits
        self._sees = sees
        self.model = model.name
        self.family: Family = open_family(directory)
        self.chat = ChatTemplate(directory)

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        return self.chat.decode

    def read(self, kind: type[R], body: bytes, *, strict: bool = False) -> R:
        """Raises RequestError (400, 404) for what can be said without looking at media. ``strict``: for a field
        that nobody knows too."""
        request = parse_request(kind, body)
        self.check_model(request.model)
        if strict and request.ignored_fields:
            name = request.ignored_fields[0]
            raise RequestError(400, f"{name} is not a field of this API", param=name, code="unknown_parameter")
        self._check_media(_sources(request))
        return request

    def check_model(self, name: str) -> None:
        """Raises RequestError (404)."""
        if name != self.model:
            text = f"no model {name!r} here; served: {self.model}"
            raise RequestError(404, text, param="model", code="model_not_found")

    def _check_media(self, sources: Sequence[Source]) -> None:
        if sources and not self._sees:
            raise _unsupported(sources[0], "this cluster has no encoder stage and takes text only")
        if len(sources) > self.limits.max_media:
            counts = Counter(source.modality for source in sources)
            what = " and ".join(f"{count} {modality.noun}s" for modality, count in counts.items())
            raise RequestError(400, f"{what}; at most {self.limits.max_media} are served", param="messages")
        taken = self.family.modalities
        if (strange := next((source for source in sources if source.modality not in taken), None)) is not None:
            takes = ", ".join(f"{modality.noun}s ({PARTS[modality]})" for modality in taken)
            why = self.family.obstacle(strange.modality)
            text = why or f"{self.model} takes no {strange.modality.noun}s; beside text it takes {takes}"
            raise _unsupported(strange, text)

    def order(self, request: ChatRequest | TextRequest, fetched: Mapping[str, bytes]) -> Order:
        """``fetched``: what the addresses of ``remote_urls`` hold. Raises RequestError (400)."""
        sources = _sources(request)
        media = [self._medium(source, fetched) for source in sources]
        if isinstance(request, ChatRequest):
            tokens = self.chat.tokens(request.messages, self.limits.max_context)
        else:
            special = request.add_special_tokens is not False
            tokens = self.chat.plain_tokens(request.text_or_ids, self.limits.max_context, special=special)
        prompt = self._expand(tokens, self._spans(sources, media))
        placed = [media[source] for source in prompt.sources]
        places = [sources[source].place for source in prompt.sources]
        return Order(prompt, placed, places, self._sampling(request, len(prompt.tokens)))

    def _medium(self, source: Source, fetched: Mapping[str, bytes]) -> Medium:
        if not source.bare and source.text in fetched:
            return measure(fetched[source.text], source, self.limits)
        return read(source, self.limits)

    def _spans(self, sources: Sequence[Source], media: Sequence[Medium]) -> list[Span]:
        of = Counter(source.modality for source in sources)
        return [
            span_of(self.family, source, medium.header, of[source.modality])
            for source, medium in zip(sources, media, strict=True)
        ]

    def _expand(self, tokens: Sequence[int], spans: Sequence[Span]) -> Prompt:
        try:
            return self.family.expand(tokens, spans)
        except ValueError as error:
            raise RequestError(400, str(error), param="messages") from error

    def _sampling(self, request: Settings, prompt_tokens: int) -> Sampling:
        max_tokens = self._answer_tokens(request, prompt_tokens)
        if (request.min_tokens or 0) > max_tokens:
            raise RequestError(
                400, f"min_tokens {request.min_tokens} is more than the answer's {max_tokens}", param="min_tokens"
            )
        ends = [] if request.ignore_eos else self.family.end_token_ids
        return Sampling(
            temperature=_or(request.temperature, 1.0),
            top_p=_or(request.top_p, 1.0),
            top_k=max(0, request.top_k or 0),
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            logit_bias=self._bias(request),
            seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed % (1 << SEED_BITS),
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            stop_token_ids=[*ends, *(request.stop_token_ids or ())],
            answer_from=prompt_tokens,
            logprobs=request.wanted_logprobs,
        )

    def _bias(self, request: Settings) -> dict[int, float]:
        bias = request.logit_bias or {}
        if unknown := [token for token in bias if token >= self.chat.vocabulary]:
            text = f"logit_bias names the token {unknown[0]}: ids end at {self.chat.vocabulary}"
            raise RequestError(400, text, param="logit_bias")
        return bias

    def _answer_tokens(self, request: Settings, prompt_tokens: int) -> int:
        asked, rest = request.answer_tokens, self.limits.max_context - prompt_tokens
        if rest < (asked or 1):
            what = f"the prompt has {prompt_tokens} tokens and the answer {asked or 1}"
            raise too_long(what, self.limits.max_context, request.answer_param if rest >= 1 else "messages")
        return asked or min(rest, DEFAULT_ANSWER_TOKENS)


def _unsupported(source: Source, text: str) -> RequestError:
    return RequestError(400, f"{source.place}: {text}", param=source.place, code="unsupported_modality")


def remote_urls(request: Settings) -> dict[str, Source]:
    """Media to be fetched: URL → where it (first) stands in the request."""
    return {each.text: each for each in reversed(_sources(request)) if not each.bare and is_remote(each.text)}


def _sources(request: Settings) -> list[Source]:
    """In the request's order."""
    return list(_media_of(request.messages)) if isinstance(request, ChatRequest) else []


def _media_of(messages: Sequence[Message]) -> Iterator[Source]:
    for number, message in enumerate(messages):
        if isinstance(message.content, str):
            continue
        for position, part in enumerate(message.content):
            if isinstance(part, MediaPart):
                yield part.source(f"messages[{number}].content[{position}]")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
