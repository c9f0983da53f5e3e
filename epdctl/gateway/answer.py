"""The answer to one request: a flight's tokens as text, cut at stop strings, and then as OpenAI's objects."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from epdctl.gateway.detokenize import TextStream
from epdctl.gateway.flight import Flight
from epdctl.gateway.schema import (
    AnswerMessage,
    ChatChunk,
    ChatResponse,
    ChatUsage,
    Choice,
    ChunkChoice,
    Delta,
)
from epdctl.wire.serve import FinishReason

__all__ = ["Answer", "Piece"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that came, and the text that they made certain: what is held back comes with a later piece."""

    text: str
    tokens: list[int]


class Answer:
    """Read ``pieces()`` to the end; then ``finish_reason`` and ``usage`` are known."""

    def __init__(self, flight: Flight, text: TextStream, *, model: str, with_ids: bool) -> None:
        self._flight = flight
        self._text = text
        self._model = model
        self._with_ids = with_ids
        self._created = int(time.time())

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Raises RequestError."""
        async with aclosing(self._flight.tokens()) as batches:
            async for tokens in batches:
                before = self._text.used
                text = self._text.push(tokens)
                yield Piece(text, tokens[: self._text.used - before])
                if self._text.stopped:
                    self._flight.stop()
                    return
        yield Piece(self._text.flush(), [])

    @property
    def finish_reason(self) -> str:
        ending = self._flight.ending
        if self._text.stopped or ending is None:
            return FinishReason.STOP.value
        return ending.reason.value

    @property
    def usage(self) -> ChatUsage:
        """A token that begins after a stop string was asked for by nobody and does not count."""
        prompt = len(self._flight.order.prompt.tokens)
        ending = self._flight.ending
        whole = ending is not None and not self._text.stopped
        completion = ending.usage.completion_tokens if ending is not None and whole else self._text.used
        cached = ending.usage.cached_tokens if ending is not None else 0
        return ChatUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details={"cached_tokens": cached},
        )

    def response(self, pieces: Sequence[Piece]) -> ChatResponse:
        content = "".join(piece.text for piece in pieces)
        ids = [token for piece in pieces for token in piece.tokens] if self._with_ids else None
        choice = Choice(message=AnswerMessage(content=content), finish_reason=self.finish_reason, token_ids=ids)
        return ChatResponse(
            id=self._flight.request,
            created=self._created,
            model=self._model,
            resumes=self._flight.resumes,
            choices=[choice],
            usage=self.usage,
        )

    def first_chunk(self) -> ChatChunk:
        return self._chunk([ChunkChoice(delta=Delta(role="assistant", content=""))])

    def piece_chunk(self, piece: Piece) -> ChatChunk | None:
        """None when there is nothing to tell yet."""
        ids = piece.tokens if self._with_ids else None
        return self._chunk([ChunkChoice(delta=Delta(content=piece.text), token_ids=ids)]) if piece.text or ids else None

    def last_chunk(self) -> ChatChunk:
        return self._chunk([ChunkChoice(delta=Delta(), finish_reason=self.finish_reason)])

    def usage_chunk(self) -> ChatChunk:
        return self._chunk([], self.usage)

    def _chunk(self, choices: list[ChunkChoice], usage: ChatUsage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._flight.request,
            created=self._created,
            model=self._model,
            resumes=self._flight.resumes,
            choices=choices,
            usage=usage,
        )
