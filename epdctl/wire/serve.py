"""Gateway ⇄ prefill, decode and language ranks, and the handoff between prefill and decode.

The order of one attempt (admission in this order cannot deadlock):

    gateway → decode   Decode            decode leases KV pages for prompt + answer
    decode  → prefill  KvLease
    gateway → prefill  Prefill           prefill takes its own KV pages and every embedding slot, all or nothing
    prefill → gateway  Granted(slots)
    gateway → router   Encode per item   (wire/encode.py); the encoder writes into the slot, then EmbeddingLanded
    prefill ⇒ decode   pages, chunk by chunk, through the transport
    prefill → decode   KvReady(first token)
    decode  → gateway  Token…, Finished

A language rank is told Generate and answers Granted, Token…, Finished.
"""

from __future__ import annotations

import enum

from epdctl.ids import Modality, RequestId, Room
from epdctl.wire.encode import EmbeddingLanded, FailureKind, RankRef
from epdctl.wire.message import Codec, Message, Part
from epdctl.wire.transfer import RemoteLease

__all__ = [
    "PREFILL_TO_DECODE",
    "RANK_TO_GATEWAY",
    "TO_DECODE",
    "TO_LANGUAGE",
    "TO_PREFILL",
    "Abort",
    "Decode",
    "Failed",
    "FinishReason",
    "Finished",
    "Generate",
    "Granted",
    "KvFailed",
    "KvLayout",
    "KvLease",
    "KvReady",
    "KvWithdrawn",
    "Likelihood",
    "Prefill",
    "PrefillToDecode",
    "PromptItem",
    "RankRef",
    "RankToGateway",
    "Sampling",
    "ToDecode",
    "ToLanguage",
    "ToPrefill",
    "Token",
    "Usage",
]


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"


class Sampling(Part, frozen=True):
    """Greedy when ``temperature`` is 0. Noise is a function of (seed, position in the sequence) and nothing else."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 16
    # The client's, and the model's unless it is to ignore them: not sent out, they end the answer.
    stop_token_ids: list[int] = []
    min_p: float = 0.0  # of the likeliest token's share
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer
    repetition_penalty: float = 1.0  # over prompt and answer
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0  # of the answer, before one of stop_token_ids may end it
    answer_from: int = 0  # where in the sequence the answer begins: what an earlier attempt answered belongs to it
    logprobs: int | None = None  # so many alternatives with each token's own; None: not even that

    @property
    def looks_back(self) -> bool:
        """The next token depends on which tokens came before, and not on the model alone."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def adjusts(self) -> bool:
        """Something changes the logits before the choice."""
        return self.looks_back or bool(self.logit_bias or self.min_tokens)


class PromptItem(Part, frozen=True):
    """Where one item's embeddings go in the prompt: ``rows`` placeholder tokens from ``offset`` on."""

    index: int
    modality: Modality
    grid: list[int]  # three numbers of the family: (t, h, w) in patches where positions follow from them
    offset: int
    rows: int
    seconds: float = 0.0  # of a video, from one step of its grid's time to the next


class Likelihood(Part, frozen=True):
    """How likely the model found a token, and what it found likeliest: natural logarithms, before any setting."""

    logprob: float
    top: list[tuple[int, float]] = []  # (token, logprob), the likeliest first


class Prefill(Message, frozen=True):
    request: RequestId
    attempt: int
    room: Room
    tokens: list[int]
    items: list[PromptItem]
    sampling: Sampling
    decode_at: RankRef
    budget_s: float
    epoch: int = 0  # of the rank it is for (Peer.epoch), as its sender knows it


class Decode(Message, frozen=True):
    request: RequestId
    attempt: int
    room: Room
    prompt_tokens: int
    sampling: Sampling
    prefill_at: RankRef
    budget_s: float
    tokens: list[int] = []  # the prompt, where ``sampling.looks_back``; nothing else on a decode rank reads it
    epoch: int = 0  # of the rank it is for (Peer.epoch), as its sender knows it


class Generate(Message, frozen=True):
    request: RequestId
    attempt: int
    tokens: list[int]
    items: list[PromptItem]
    sampling: Sampling
    budget_s: float
    epoch: int = 0  # of the rank it is for (Peer.epoch), as its sender knows it


class Abort(Message, frozen=True):
    """Give up this attempt and free all it holds. Unknown ones are fine."""

    request: RequestId
    attempt: int


class KvLayout(Part, frozen=True):
    """Both ends must have the same; a difference is refused with both values."""

    page_size: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def page_bytes(self) -> int:
        width = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return self.layers * 2 * self.page_size * self.kv_heads * self.head_dim * width


class KvLease(Message, frozen=True):
    """One extent per page, in token order; the pages hold prompt and answer, prefill fills the prompt's.

    Decode sends it over its link to prefill's inbox; KvReady or KvFailed come back over the same link.
    """

    request: RequestId
    attempt: int
    room: Room
    lease: RemoteLease
    layout: KvLayout
    epoch: int = 0  # of the rank it is for (Peer.epoch), as its sender knows it


class KvWithdrawn(Message, frozen=True):
    """Decode gave the room up."""

    room: Room
    attempt: int


class KvReady(Message, frozen=True):
    """Every prompt page has landed. ``rope_delta``: decode position = length + delta."""

    room: Room
    attempt: int
    first_token: int
    rope_delta: int
    cached_tokens: int = 0
    likelihood: Likelihood | None = None  # of the first token


class KvFailed(Message, frozen=True):
    room: Room
    attempt: int
    kind: FailureKind
    text: str


class Granted(Message, frozen=True):
    """One slot per item, in item order; empty for a prompt without pictures."""

    request: RequestId
    attempt: int
    slots: list[RemoteLease]
    notify: str  # the granting rank's inbox, for EmbeddingLanded


class Usage(Part, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Token(Message, frozen=True):
    """One token; ``index`` counts within this attempt from 0."""

    request: RequestId
    attempt: int
    index: int
    token: int
    likelihood: Likelihood | None = None  # where ``sampling.logprobs`` asks for it


class Finished(Message, frozen=True):
    """The end token is counted in usage and not sent as a Token."""

    request: RequestId
    attempt: int
    reason: FinishReason
    usage: Usage


class Failed(Message, frozen=True):
    """This attempt is over on this rank. RANK_LOST may be tried again; the others go to the client."""

    request: RequestId
    attempt: int
    kind: FailureKind
    text: str


ToPrefill = Prefill | Abort | KvLease | KvWithdrawn | EmbeddingLanded
PrefillToDecode = KvReady | KvFailed
ToDecode = Decode | Abort
ToLanguage = Generate | Abort | EmbeddingLanded
RankToGateway = Granted | Token | Finished | Failed

TO_PREFILL: Codec[ToPrefill] = Codec(ToPrefill)
PREFILL_TO_DECODE: Codec[PrefillToDecode] = Codec(PrefillToDecode)
TO_DECODE: Codec[ToDecode] = Codec(ToDecode)
TO_LANGUAGE: Codec[ToLanguage] = Codec(ToLanguage)
RANK_TO_GATEWAY: Codec[RankToGateway] = Codec(RankToGateway)
