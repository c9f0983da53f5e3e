"""The encoder's side of the wire: gateway ⇄ router ⇄ encoder ranks, and the encoder's word to the rank that waits."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from epdctl.ids import Incarnation, Modality, RankName, RequestId
from epdctl.wire.message import Codec, Message, Part
from epdctl.wire.transfer import RemoteLease, TensorSpec

__all__ = [
    "CLIENT_TO_ROUTER",
    "ENCODER_TO_LANGUAGE",
    "MAX_BUDGET_SECONDS",
    "ROUTER_TO_CLIENT",
    "ROUTER_TO_WORKER",
    "WORKER_TO_ROUTER",
    "CancelEncode",
    "CancelItem",
    "ClientToRouter",
    "EmbeddingLanded",
    "Encode",
    "EncodeFailed",
    "EncodeItem",
    "Encoded",
    "FailureKind",
    "ItemEncoded",
    "ItemFailed",
    "ItemSized",
    "MediaItem",
    "Profiled",
    "Prove",
    "Proved",
    "RankRef",
    "RouterToClient",
    "RouterToWorker",
    "Sized",
    "Source",
    "StartProfile",
    "StopProfile",
    "WorkerToRouter",
]


MAX_BUDGET_SECONDS = 30 * 86_400.0


class FailureKind(enum.StrEnum):
    """What went wrong with a piece of work; each maps to one HTTP status at the gateway."""

    BAD_MEDIA = "bad-media"  # 400: the medium is not what it says
    TOO_LARGE = "too-large"  # 400
    FULL = "full"  # 429
    NO_RANK = "no-rank"  # 503
    RANK_LOST = "rank-lost"  # 503: retried first
    DEADLINE = "deadline"  # 504
    INTERNAL = "internal"  # 502


class Source(enum.StrEnum):
    """Where an embedding came from."""

    MADE = "made"
    SHARED = "shared"  # an identical item was in flight
    CACHED = "cached"


class RankRef(Part, frozen=True):
    rank: RankName
    incarnation: Incarnation


class MediaItem(Part, frozen=True):
    """One medium of a request. Its bytes travel in the frame behind the message, as the client sent them."""

    index: int  # among the request's items, in prompt order
    modality: Modality
    content_hash: str  # blake2b-128 of the bytes, hex
    of: int  # how many of its kind the request has (some processors tile a lone picture)
    grid: list[int]  # three numbers of the family, from the header by Family.span; the encoder checks them
    rows: int  # embeddings that will come


class Encode(Message, frozen=True):
    """+ 1 frame: the medium as it came. Sent once the slot is granted, so that no waiting request holds an encoder.

    Without a slot the embedding comes back in the frame behind Encoded, and its shape before that, as Sized.
    """

    request: RequestId
    attempt: int
    item: MediaItem
    slot: RemoteLease | None
    notify: str  # inbox of the rank that owns the slot; "" without one
    budget_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_BUDGET_SECONDS)]  # not NaN either: that would never end


class CancelEncode(Message, frozen=True):
    """Every item of this attempt."""

    request: RequestId
    attempt: int


class Sized(Message, frozen=True):
    """Of an item without a slot: what will come. Said again when the item goes to another rank."""

    request: RequestId
    attempt: int
    index: int
    spec: TensorSpec


class Encoded(Message, frozen=True):
    """+ 1 frame, as ``spec`` says, for an item without a slot."""

    request: RequestId
    attempt: int
    index: int
    by: RankName
    incarnation: Incarnation
    spec: TensorSpec | None = None


class EncodeFailed(Message, frozen=True):
    request: RequestId
    attempt: int
    index: int
    kind: FailureKind
    text: str
    lost: list[RankRef] = []  # the encoders that went away while they had the item


class EncodeItem(Message, frozen=True):
    """+ 1 frame. ``dispatch`` is drawn by the router for this try of this item; every reply carries it."""

    dispatch: int
    job: Encode
    epoch: int = 0  # of the rank it is for (Peer.epoch), as its sender knows it


class CancelItem(Message, frozen=True):
    dispatch: int


class ItemSized(Message, frozen=True):
    """Said after preprocessing, before the forward."""

    dispatch: int
    spec: TensorSpec


class ItemEncoded(Message, frozen=True):
    """The bytes are in the slot, or in the frame behind this when there is none."""

    dispatch: int
    spec: TensorSpec
    source: Source = Source.MADE
    cache_bytes: int = 0  # what the rank remembers by now


class ItemFailed(Message, frozen=True):
    """NO_RANK: this rank did not take it, and another may."""

    dispatch: int
    kind: FailureKind
    text: str


class StartProfile(Message, frozen=True):
    path: str  # the trace file this rank is to write
    steps: int | None = None  # batches; None: until StopProfile


class StopProfile(Message, frozen=True):
    pass


class Profiled(Message, frozen=True):
    """The trace is written, or cannot be."""

    path: str
    error: str | None = None
    note: str | None = None  # why there is none, where that is no fault


class Prove(Message, frozen=True):
    """Encode the canary now, past the router's queue, and say what came of it."""

    number: int


class Proved(Message, frozen=True):
    """``fault``: why this rank is not fit to serve; ``busy``: real work took all the time there was, and got done."""

    number: int  # of the question
    fault: str | None = None
    busy: bool = False


class EmbeddingLanded(Message, frozen=True):
    """To the slot's owner: this item may be read."""

    request: RequestId
    attempt: int
    index: int
    lease: int
    generation: int
    spec: TensorSpec


ClientToRouter = Encode | CancelEncode
RouterToClient = Sized | Encoded | EncodeFailed
RouterToWorker = EncodeItem | CancelItem | StartProfile | StopProfile | Prove
WorkerToRouter = ItemSized | ItemEncoded | ItemFailed | Profiled | Proved
EncoderToLanguage = EmbeddingLanded

CLIENT_TO_ROUTER: Codec[ClientToRouter] = Codec(ClientToRouter)
ROUTER_TO_CLIENT: Codec[RouterToClient] = Codec(RouterToClient)
ROUTER_TO_WORKER: Codec[RouterToWorker] = Codec(RouterToWorker)
WORKER_TO_ROUTER: Codec[WorkerToRouter] = Codec(WorkerToRouter)
ENCODER_TO_LANGUAGE: Codec[EncoderToLanguage] = Codec(EncoderToLanguage)
