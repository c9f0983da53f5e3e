"""The answer to one request: a flight's tokens as text, cut at stop strings, with what is known of each token."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from epdctl.errors import RequestError
from epdctl.gateway.detokenize import TextStream
from epdctl.gateway.fields import Settings
from epdctl.gateway.flight import Flight
from epdctl.gateway.replies import Usage
from epdctl.wire.serve import FinishReason, Likelihood

__all__ = ["Answer", "Likely", "Piece"]


@dataclass(frozen=True, slots=True)
class Likely:
    """A token whose text is out; ``offset``: where that begins, in characters of the answer."""

    token: int
    likelihood: Likelihood
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that came, and the text that they made certain: what is held back comes with a later piece.

    ``likely``: with the text and not with the tokens, so that none is told whose text a stop string cuts off.
    """

    text: str
    tokens: list[int]
    likely: list[Likely] = field(default_factory=list)


class Answer:
    """Read ``pieces()`` to the end; then ``finish_reason`` and ``usage`` are known."""

    def __init__(self, flight: Flight, text: TextStream, asked: Settings) -> None:
        self._flight = flight
        self._text = text
        self._tokens: list[int] = []
        self._told = 0  # tokens whose likelihood is out
        self.asked = asked
        self.created = int(time.time())

    @property
    def id(self) -> str:
        return self._flight.request

    @property
    def resumes(self) -> int:
        return self._flight.resumes

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Raises RequestError."""
        async with aclosing(self._flight.tokens()) as batches:
            async for tokens in batches:
                before = self._text.used
                text = self._text.push(tokens)
                fresh = tokens[: self._text.used - before]
                self._tokens += fresh
                yield Piece(text, fresh, self._likely(whole=False))
                if self._text.stopped:
                    self._flight.stop()
                    return
        text = self._text.flush()
        yield Piece(text, [], self._likely(whole=not self._text.stopped))

    @property
    def finish_reason(self) -> str:
        ending = self._flight.ending
        if self._text.stopped or ending is None:
            return FinishReason.STOP.value
        return ending.reason.value

    @property
    def usage(self) -> Usage:
        """A token that begins after a stop string was asked for by nobody and does not count."""
        prompt = len(self._flight.order.prompt.tokens)
        ending = self._flight.ending
        whole = ending is not None and not self._text.stopped
        completion = ending.usage.completion_tokens if ending is not None and whole else self._text.used
        cached = ending.usage.cached_tokens if ending is not None else 0
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details={"cached_tokens": cached},
        )

    def _likely(self, *, whole: bool) -> list[Likely]:
        """Of the tokens whose text has begun to come out, or of all the rest."""
        if self.asked.wanted_logprobs is None:
            return []
        found = []
        while self._told < self._text.used and (whole or self._text.offsets[self._told] < self._text.released):
            found.append(self._likely_one(self._told))
            self._told += 1
        return found

    def _likely_one(self, place: int) -> Likely:
        likelihood = self._flight.likelihoods[place]
        if likelihood is None:
            raise RequestError(502, f"the rank that answered sent no logprobs for token {place}", code="internal")
        return Likely(self._tokens[place], likelihood, self._text.offsets[place])
