"""From the bytes of a body to an Order: everything about a request that is known before any rank is asked.

Runs on a thread of a bounded pool; touches no socket, no shared state.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from epdctl.errors import RequestError
from epdctl.families import open_family
from epdctl.families.base import Family, Picture, Prompt
from epdctl.gateway.chat import ChatTemplate, too_long
from epdctl.rank.media import Medium, read_picture
from epdctl.gateway.schema import ChatRequest, ImagePart, Message, parse_request
from epdctl.wire.config import Limits, ModelConfig
from epdctl.wire.encode import MediaItem
from epdctl.wire.serve import Sampling

__all__ = ["DEFAULT_ANSWER_TOKENS", "Intake", "Order"]

# Ranks set memory aside for the whole answer, so "until the context ends" would let few requests in at a time.
DEFAULT_ANSWER_TOKENS = 1024
SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class Order:
    """One request, bounded and tokenised. ``media[i]`` is the picture of ``prompt.items[i]``."""

    prompt: Prompt
    media: Sequence[Medium]
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
            of=len(self.media),
            grid=item.grid,
            rows=item.rows,
        )


class Intake:
    """The model's tokenizer, template and sizes, and the limits of this cluster. Threads may share it."""

    def __init__(self, model: ModelConfig, limits: Limits) -> None:
        """Reads the checkpoint's small files; raises LoadError."""
        directory = Path(model.path)
        self.limits = limits
        self.model = model.name
        self.family: Family = open_family(directory)
        self.chat = ChatTemplate(directory)

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        return self.chat.decode

    def order(self, body: bytes) -> tuple[ChatRequest, Order]:
        """Raises RequestError (400, 404) for whatever is wrong with it."""
        request = parse_request(body)
        if request.model != self.model:
            raise RequestError(
                404, f"no model {request.model!r} here; served: {self.model}", param="model", code="model_not_found"
            )
        media = self._media(request.messages)
        tokens = self.chat.tokens(request.messages, self.limits.max_context)
        prompt = self._expand(tokens, self._pictures(media))
        return request, Order(prompt, media, self._sampling(request, len(prompt.tokens)))

    def _media(self, messages: Sequence[Message]) -> list[Medium]:
        found = list(_image_urls(messages))
        if len(found) > self.limits.max_images:
            raise RequestError(
                400, f"{len(found)} pictures; at most {self.limits.max_images} are served", param="messages"
            )
        return [read_picture(url, param, self.limits) for param, url in found]

    def _pictures(self, media: Sequence[Medium]) -> list[Picture]:
        try:
            return [self.family.picture_tokens(medium.width, medium.height, len(media)) for medium in media]
        except ValueError as error:
            raise RequestError(400, str(error), param="messages", code="invalid_image") from error

    def _expand(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> Prompt:
        try:
            return self.family.expand(tokens, pictures)
        except ValueError as error:
            raise RequestError(400, str(error), param="messages") from error

    def _sampling(self, request: ChatRequest, prompt_tokens: int) -> Sampling:
        return Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            seed=secrets.randbits(SEED_BITS) if request.seed is None else request.seed % (1 << SEED_BITS),
            max_tokens=self._answer_tokens(request.answer_tokens, prompt_tokens),
            ignore_eos=bool(request.ignore_eos),
            stop_token_ids=list(self.family.end_token_ids),
        )

    def _answer_tokens(self, asked: int | None, prompt_tokens: int) -> int:
        rest = self.limits.max_context - prompt_tokens
        if rest < (asked or 1):
            raise too_long(
                f"the prompt has {prompt_tokens} tokens and the answer {asked or 1}", self.limits.max_context
            )
        return asked or min(rest, DEFAULT_ANSWER_TOKENS)


def _image_urls(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """(path in the request, URL) in prompt order."""
    for number, message in enumerate(messages):
        if isinstance(message.content, str):
            continue
        for position, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                yield f"messages[{number}].content[{position}].image_url.url", part.image_url.url
