"""An answer in the two forms that OpenAI gives it: chat completions and text completions. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel

from epdctl.gateway.answer import Answer, Likely, Piece
from epdctl.gateway.replies import (
    AnswerMessage,
    ChatChunk,
    ChatResponse,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    TextChoice,
    TextLogprobs,
    TextResponse,
    TokenLogprob,
    TopLogprob,
)

__all__ = ["ChatForm", "Form", "Spell", "TextForm"]

Spell = Callable[[int], bytes]


class Form(ABC):
    """One answer on its way out: ``whole``, or ``first``, ``piece`` … ``last`` and, where asked for, ``usage``."""

    def __init__(self, answer: Answer, model: str, spell: Spell) -> None:
        self._answer = answer
        self._asked = answer.asked
        self._model = model
        self._spell = spell

    @abstractmethod
    def whole(self, pieces: Sequence[Piece]) -> BaseModel: ...

    @abstractmethod
    def first(self) -> BaseModel | None:
        """What opens a stream, if anything does."""

    @abstractmethod
    def piece(self, piece: Piece) -> BaseModel: ...

    @abstractmethod
    def last(self) -> BaseModel: ...

    @abstractmethod
    def usage(self) -> BaseModel: ...

    def says_nothing(self, piece: Piece) -> bool:
        return not (piece.text or piece.likely or (piece.tokens and self._asked.return_token_ids))

    def _envelope(self) -> dict[str, Any]:
        answer = self._answer
        return {"id": answer.id, "created": answer.created, "model": self._model, "resumes": answer.resumes}

    def _chunk_usage(self) -> dict[str, Any]:
        return {"usage": self._answer.usage} if self._asked.usage_always else {}

    def _ids(self, tokens: Sequence[int]) -> list[int] | None:
        return list(tokens) if self._asked.return_token_ids else None


class ChatForm(Form):
    def whole(self, pieces: Sequence[Piece]) -> ChatResponse:
        joined = _joined(pieces)
        choice = Choice(
            message=AnswerMessage(content=joined.text),
            logprobs=self._logprobs(joined.likely),
            finish_reason=self._answer.finish_reason,
            token_ids=self._ids(joined.tokens),
        )
        return ChatResponse(**self._envelope(), choices=[choice], usage=self._answer.usage)

    def first(self) -> ChatChunk:
        return self._chunk(ChunkChoice(delta=Delta(role="assistant", content="")))

    def piece(self, piece: Piece) -> ChatChunk:
        logprobs = self._logprobs(piece.likely) if piece.likely else None
        ids = self._ids(piece.tokens)
        return self._chunk(ChunkChoice(delta=Delta(content=piece.text), logprobs=logprobs, token_ids=ids))

    def last(self) -> ChatChunk:
        return self._chunk(ChunkChoice(delta=Delta(), finish_reason=self._answer.finish_reason))

    def usage(self) -> ChatChunk:
        return ChatChunk(**self._envelope(), choices=[], usage=self._answer.usage)

    def _chunk(self, choice: ChunkChoice) -> ChatChunk:
        return ChatChunk(**self._envelope(), choices=[choice], **self._chunk_usage())

    def _logprobs(self, likely: Sequence[Likely]) -> ChoiceLogprobs | None:
        if self._asked.wanted_logprobs is None:
            return None
        return ChoiceLogprobs(content=[self._token(each) for each in likely])

    def _token(self, each: Likely) -> TokenLogprob:
        top = [self._top(token, logprob) for token, logprob in each.likelihood.top]
        own = self._top(each.token, each.likelihood.logprob)
        return TokenLogprob(**own.model_dump(), top_logprobs=top)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        spelled = self._spell(token)
        return TopLogprob(token=_text(spelled), logprob=logprob, bytes=list(spelled))


class TextForm(Form):
    def whole(self, pieces: Sequence[Piece]) -> TextResponse:
        joined = _joined(pieces)
        choice = self._choice(joined, self._answer.finish_reason)
        return TextResponse(**self._envelope(), choices=[choice], usage=self._answer.usage)

    def first(self) -> None:
        """Nothing: there is no role to tell."""

    def piece(self, piece: Piece) -> TextResponse:
        return TextResponse(**self._envelope(), choices=[self._choice(piece, None)], **self._chunk_usage())

    def last(self) -> TextResponse:
        choice = TextChoice(text="", finish_reason=self._answer.finish_reason)
        return TextResponse(**self._envelope(), choices=[choice], **self._chunk_usage())

    def usage(self) -> TextResponse:
        return TextResponse(**self._envelope(), choices=[], usage=self._answer.usage)

    def _choice(self, piece: Piece, reason: str | None) -> TextChoice:
        logprobs = None if self._asked.wanted_logprobs is None else self._logprobs(piece.likely)
        return TextChoice(text=piece.text, logprobs=logprobs, finish_reason=reason, token_ids=self._ids(piece.tokens))

    def _logprobs(self, likely: Sequence[Likely]) -> TextLogprobs:
        return TextLogprobs(
            tokens=[self._word(each.token) for each in likely],
            token_logprobs=[each.likelihood.logprob for each in likely],
            top_logprobs=[self._alternatives(each) for each in likely],
            text_offset=[each.offset for each in likely],
        )

    def _alternatives(self, each: Likely) -> dict[str, float]:
        """With the token itself, wherever it stands. Of several that read the same the likeliest counts."""
        found: dict[str, float] = {}
        for token, logprob in (*each.likelihood.top, (each.token, each.likelihood.logprob)):
            found.setdefault(self._word(token), logprob)
        return found

    def _word(self, token: int) -> str:
        return _text(self._spell(token))


def _text(spelled: bytes) -> str:
    return spelled.decode(errors="replace")


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [each for piece in pieces for each in piece.likely],
    )
