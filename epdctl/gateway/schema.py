"""OpenAI's chat completions, as far as epdctl serves them: what may come in, and what goes out.

A field that would change the answer and is not served is refused by name; any other unknown field is ignored, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from epdctl.errors import RequestError

__all__ = [
    "AssistantMessage",
    "ChatChunk",
    "ChatRequest",
    "ChatResponse",
    "ChatUsage",
    "Choice",
    "ChunkChoice",
    "Delta",
    "ErrorBody",
    "ErrorDetail",
    "ImagePart",
    "Message",
    "SystemMessage",
    "TextPart",
    "UserMessage",
    "error_body",
    "parse_request",
]

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
INT64 = 2**63

# field → the values that ask for nothing; anything else would change the answer
REFUSED: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None, []),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "modalities": (None, [], ["text"]),
    "mm_processor_kwargs": (None, {}),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "stop_token_ids": (None, []),
    "suffix": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
REFUSED_OF_ASSISTANT: Mapping[str, tuple[object, ...]] = {
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
    "refusal": (None,),
}


class _In(BaseModel):
    """Numbers are numbers and not text that looks like one."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    @property
    def ignored(self) -> list[str]:
        return sorted(self.model_extra or ())


class TextPart(_In):
    type: Literal["text"]
    text: str


class ImageUrl(_In):
    url: str


class ImagePart(_In):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _content_kind(value: object) -> str:
    return "~parts" if isinstance(value, list) else "~text"


TextContent = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[TextPart], Field(min_length=1), Tag("~parts")],
    Discriminator(_content_kind),
]
PartContent = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[Part], Field(min_length=1), Tag("~parts")],
    Discriminator(_content_kind),
]


class SystemMessage(_In):
    role: Literal["system"]
    content: TextContent


class UserMessage(_In):
    role: Literal["user"]
    content: PartContent


class AssistantMessage(_In):
    role: Literal["assistant"]
    content: TextContent

    @model_validator(mode="after")
    def _served(self) -> AssistantMessage:
        _refuse(self.model_extra or {}, REFUSED_OF_ASSISTANT)
        return self


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Count = Annotated[int, Field(ge=1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def _stop_kind(value: object) -> str:
    return "~list" if isinstance(value, list) else "~one"


Stop = Annotated[
    Annotated[StopText, Tag("~one")] | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag("~list")],
    Discriminator(_stop_kind),
]


class StreamOptions(_In):
    include_usage: bool = False


class ChatRequest(_In):
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Stop | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(default=None, ge=1, le=1)
    return_token_ids: bool | None = None  # vLLM's extension: the ids beside the text

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        _refuse(self.model_extra or {}, REFUSED)
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options needs stream: true", param="stream_options")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                400, "max_tokens and max_completion_tokens differ: send one of them", param="max_completion_tokens"
            )
        return self

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def ignored_fields(self) -> list[str]:
        """Fields that changed nothing, most of them because only OpenAI's own service knows them."""
        return sorted(set(self.ignored) - set(REFUSED))


def _refuse(given: Mapping[str, object], table: Mapping[str, tuple[object, ...]]) -> None:
    for name, neutral in table.items():
        if name in given and given[name] not in neutral:
            raise RequestError(400, f"{name} is not served: leave it out", param=name, code="unsupported_parameter")


def parse_request(body: bytes) -> ChatRequest:
    """Raises RequestError (400) that names the first field that is wrong."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _as_request_error(error) from error


def _as_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = _path(first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {text.removeprefix('Invalid JSON: ')}")
    return RequestError(400, f"{param}: {text}" if param else text, param=param or None)


# pydantic puts the name of a union's branch into the path; a client knows nothing of branches
_BRANCHES = frozenset({"system", "user", "assistant"})
_PART_BRANCHES = frozenset({"text", "image_url"})


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for position, name in enumerate(location):
        before = location[position - 1] if position else None
        if isinstance(name, int):
            path += f"[{name}]"
        elif not (name.startswith("~") or (isinstance(before, int) and name in _BRANCHES | _PART_BRANCHES)):
            path += f".{name}" if path else name
    return path


# -- what goes out --


class _Out(BaseModel):
    model_config = ConfigDict(frozen=True)


class ChatUsage(_Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] = {}


class AnswerMessage(_Out):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class _Ids(_Out):
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
    logprobs: None = None
    finish_reason: str


class Delta(_Out):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _said(self) -> dict[str, str]:
        """A field that says nothing is left out, as OpenAI does."""
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChunkChoice(_Ids):
    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: str | None = None


class _Envelope(_Out):
    id: str
    created: int  # unix seconds
    model: str
    resumes: int = 0  # times the answer went on after the loss of a rank; epdctl's own field


class ChatResponse(_Envelope):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: ChatUsage


class ChatChunk(_Envelope):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None


class ErrorDetail(_Out):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Out):
    error: ErrorDetail


def error_body(error: RequestError) -> ErrorBody:
    return ErrorBody(error=ErrorDetail(message=error.message, type=error.kind, param=error.param, code=error.code))
