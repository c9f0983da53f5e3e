"""OpenAI's chat and text completions, as far as epdctl serves them: what may come in, and what an error looks like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from epdctl.errors import RequestError
from epdctl.gateway.fields import MAX_TOP_LOGPROBS, Incoming, Settings, TokenId
from epdctl.gateway.unserved import (
    REFUSED_OF_ASSISTANT,
    REFUSED_OF_CHAT,
    REFUSED_OF_IMAGE,
    REFUSED_OF_MESSAGE,
    REFUSED_OF_URL,
    TAKEN_OF_PART,
)
from epdctl.ids import Modality
from epdctl.rank.media import Source

__all__ = [
    "PARTS",
    "AssistantMessage",
    "AudioUrl",
    "AudioUrlPart",
    "ChatRequest",
    "ErrorBody",
    "ErrorDetail",
    "ImagePart",
    "ImageUrl",
    "InputAudio",
    "InputAudioPart",
    "MediaPart",
    "Message",
    "SystemMessage",
    "TextPart",
    "TextRequest",
    "UserMessage",
    "VideoPart",
    "VideoUrl",
    "error_body",
    "parse_request",
]

TEXT_ANSWER_TOKENS = 16  # OpenAI's default for text completions


class TextPart(Incoming):
    taken = TAKEN_OF_PART

    type: Literal["text"]
    text: str


class ImageUrl(Incoming):
    refused = REFUSED_OF_URL
    taken = TAKEN_OF_PART

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None  # a hint: the checkpoint's processor decides


class MediaPart(Incoming):
    """A part that becomes an item."""

    taken = TAKEN_OF_PART
    modality: ClassVar[Modality]

    def source(self, place: str) -> Source:
        """``place``: the part's own, in the request."""
        raise NotImplementedError


class ImagePart(MediaPart):
    refused = REFUSED_OF_IMAGE
    modality = Modality.IMAGE

    type: Literal["image_url"]
    image_url: ImageUrl

    def source(self, place: str) -> Source:
        return Source(self.modality, f"{place}.image_url.url", self.image_url.url)


class AudioUrl(Incoming):
    taken = TAKEN_OF_PART

    url: str


class AudioUrlPart(MediaPart):
    """The field's extension: what image_url is for pictures."""

    modality = Modality.AUDIO

    type: Literal["audio_url"]
    audio_url: AudioUrl

    def source(self, place: str) -> Source:
        return Source(self.modality, f"{place}.audio_url.url", self.audio_url.url)


class InputAudio(Incoming):
    data: str  # base64
    format: Literal["wav", "mp3", "flac", "ogg"]  # said, and not believed


class InputAudioPart(MediaPart):
    """OpenAI's."""

    modality = Modality.AUDIO

    type: Literal["input_audio"]
    input_audio: InputAudio

    def source(self, place: str) -> Source:
        return Source(self.modality, f"{place}.input_audio.data", self.input_audio.data, bare=True)


class VideoUrl(Incoming):
    refused = REFUSED_OF_URL
    taken = TAKEN_OF_PART

    url: str


class VideoPart(MediaPart):
    """The field's extension."""

    modality = Modality.VIDEO

    type: Literal["video_url"]
    video_url: VideoUrl

    def source(self, place: str) -> Source:
        return Source(self.modality, f"{place}.video_url.url", self.video_url.url)


Part = Annotated[TextPart | ImagePart | AudioUrlPart | InputAudioPart | VideoPart, Field(discriminator="type")]

# how a medium is sent: for messages that say what a model takes
PARTS: Mapping[Modality, str] = {
    Modality.IMAGE: "image_url",
    Modality.AUDIO: "input_audio or audio_url",
    Modality.VIDEO: "video_url",
}


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


class Turn(Incoming):
    """``name`` tells speakers of one role apart; templates of the families here do not read it."""

    refused = REFUSED_OF_MESSAGE

    name: str | None = None


class SystemMessage(Turn):
    role: Literal["system", "developer"]  # OpenAI's new name for the same
    content: TextContent


class UserMessage(Turn):
    role: Literal["user"]
    content: PartContent


class AssistantMessage(Turn):
    refused = REFUSED_OF_ASSISTANT

    role: Literal["assistant"]
    content: TextContent


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class ChatRequest(Settings):
    refused = REFUSED_OF_CHAT

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
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
    def answer_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "~text"
    first = value[0] if value else 0
    return "~texts" if isinstance(first, str) else "~lists" if isinstance(first, list) else "~ids"


Ids = Annotated[list[TokenId], Field(min_length=1)]
OneText = Annotated[list[str], Field(min_length=1, max_length=1)]
OneList = Annotated[list[Ids], Field(min_length=1, max_length=1)]


class TextRequest(Settings):
    prompt: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[OneText, Tag("~texts")]
        | Annotated[Ids, Tag("~ids")]
        | Annotated[OneList, Tag("~lists")],
        Discriminator(_prompt_kind),
    ]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool | None = None  # vLLM's: to a text, those that the tokenizer writes around it

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens or TEXT_ANSWER_TOKENS

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def text_or_ids(self) -> str | list[int]:
        """The one prompt there is."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        first = prompt[0]
        return first if isinstance(first, str | list) else [each for each in prompt if isinstance(each, int)]


R = TypeVar("R", bound=Settings)


def parse_request(kind: type[R], body: bytes) -> R:
    """Raises RequestError (400) that names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _as_request_error(error) from error


def _as_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = _path(first["loc"])
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON: {text.removeprefix('Invalid JSON: ')}")
    if first["type"].startswith("union_tag") and _A_MESSAGE.fullmatch(param):
        param, text = f"{param}.role", "expected system, developer, user or assistant; tools are not served"
    return RequestError(400, f"{param}: {text}" if param else text, param=param or None)


_A_MESSAGE = re.compile(r"messages\[\d+\]")

# pydantic puts the name of a union's branch into the path; a client knows nothing of branches
_BRANCHES = frozenset({"system", "developer", "user", "assistant"})
_PART_BRANCHES = frozenset({"text", "image_url", "audio_url", "input_audio", "video_url"})


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for position, name in enumerate(location):
        before = location[position - 1] if position else None
        if isinstance(name, int):
            path += f"[{name}]"
        elif not (name.startswith("~") or (isinstance(before, int) and name in _BRANCHES | _PART_BRANCHES)):
            path += f".{name}" if path else name
    return path


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def error_body(error: RequestError) -> ErrorBody:
    return ErrorBody(error=ErrorDetail(message=error.message, type=error.kind, param=error.param, code=error.code))
