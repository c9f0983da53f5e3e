"""OpenAI's answers, whole and in chunks: what goes out."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

__all__ = [
    "AnswerMessage",
    "ChatChunk",
    "ChatResponse",
    "Choice",
    "ChoiceLogprobs",
    "ChunkChoice",
    "Delta",
    "TextChoice",
    "TextLogprobs",
    "TextResponse",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
]


class Outgoing(BaseModel):
    model_config = ConfigDict(frozen=True)


class Usage(Outgoing):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] = {}


class TopLogprob(Outgoing):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(Outgoing):
    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Outgoing):
    """``text_offset``: where in the answer's text each token begins, in characters."""

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []


class AnswerMessage(Outgoing):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class _Ids(Outgoing):
    """``token_ids``, end token excluded; left out of the JSON unless asked for."""

    token_ids: list[int] | None = None

    @model_serializer(mode="wrap")
    def _asked(self, plain: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields: dict[str, object] = plain(self)
        if self.token_ids is None:
            del fields["token_ids"]
        return fields


class Choice(_Ids):
    index: int = 0
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str


class Delta(Outgoing):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _said(self) -> dict[str, str]:
        """A field that says nothing is left out, as OpenAI does."""
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChunkChoice(_Ids):
    index: int = 0
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class TextChoice(_Ids):
    """Of a whole text completion, and of one of its chunks."""

    index: int = 0
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class _Envelope(Outgoing):
    id: str
    created: int  # unix seconds
    model: str
    resumes: int = 0  # times the answer went on after the loss of a rank; epdctl's own field


class ChatResponse(_Envelope):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: Usage


class ChatChunk(_Envelope):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextResponse(_Envelope):
    """Whole, or a chunk: OpenAI gives both the same name."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None
