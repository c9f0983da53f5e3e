"""The fields that chat and text completions share, and what becomes of those that nobody here serves.

A field that would change the answer and is not served is refused; one that changes nothing is ignored, and said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from epdctl.errors import RequestError
from epdctl.gateway.unserved import REFUSED, TAKEN, Refused

__all__ = ["MAX_TOP_LOGPROBS", "Incoming", "Settings"]

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_IDS = 1024  # entries of logit_bias, or of stop_token_ids
MAX_TOP_LOGPROBS = 20
INT64 = 2**63


class Incoming(BaseModel):
    """Numbers are numbers and not text that looks like one. Beside its fields it knows those that are ``refused``, and
    those that are ``taken`` without a part in the answer."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    refused: ClassVar[Refused] = {}
    taken: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _served(self) -> Self:
        """Raises RequestError (400) for a field that asks for something which is refused."""
        given = self.model_extra or {}
        for name, neutral in self.refused.items():
            if name in given and given[name] not in neutral:
                raise RequestError(400, f"{name} is not served: leave it out", param=name, code="unsupported_parameter")
        return self


def _stop_kind(value: object) -> str:
    return "~list" if isinstance(value, list) else "~one"


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopText, Tag("~one")] | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag("~list")],
    Discriminator(_stop_kind),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class StreamOptions(Incoming):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the counts so far in every chunk
    include_obfuscation: bool = False  # taken: TLS in front may pad; chunks carry no noise of ours


BULK = frozenset({"messages", "prompt"})


class Settings(Incoming):
    """How the answer is to be made."""

    refused = REFUSED
    taken = TAKEN

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, allow_inf_nan=False)
    logit_bias: dict[TokenId, Bias] | None = Field(default=None, max_length=MAX_IDS)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=MAX_IDS)
    ignore_eos: bool | None = None
    n: int | None = Field(default=None, ge=1, le=1)
    return_token_ids: bool | None = None  # vLLM's extension: the ids beside the text

    @model_validator(mode="after")
    def _streams(self) -> Settings:
        if self.stream_options is not None and not self.stream:
            raise RequestError(400, "stream_options needs stream: true", param="stream_options")
        return self

    def bare(self) -> Self:
        """How the answer is to look, without what it is to answer: that is most of the bytes."""
        kept = {name: getattr(self, name) for name in type(self).model_fields if name not in BULK}
        return self.model_construct(**kept)

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def answer_param(self) -> str:
        """Which field said how many."""
        return "max_tokens"

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives beside each token's own; None: nothing of the kind."""
        return None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_always(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def ignored_fields(self) -> list[str]:
        """Fields that changed nothing: ``colour``, ``messages.name``."""
        return sorted(set(strange_fields(self)))


def strange_fields(part: Incoming) -> Iterator[str]:
    """Fields of ``part``, and of what it is made of, that nobody here knows."""
    yield from (name for name in part.model_extra or () if name not in part.refused and name not in part.taken)
    for name in type(part).model_fields:
        value = getattr(part, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Incoming):
                yield from (f"{name}.{below}" for below in strange_fields(each))
