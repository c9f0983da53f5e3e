"""What ranks note of the requests that pass through them while a capture runs, and what the merge of a capture is told.

Times are nanoseconds of unix time, as the rank's own clock shows them; profilers write the same clock.
"""

from __future__ import annotations

import enum

import msgspec

from epdctl.ids import RankName, RequestId
from epdctl.wire.message import Codec, Message, Part

__all__ = [
    "HOP_LIST",
    "MERGE_ORDER",
    "MERGE_REPORT",
    "Hop",
    "HopList",
    "Kind",
    "MergeOrder",
    "MergeReport",
    "MergedSource",
    "TraceSource",
]


class Kind(enum.StrEnum):
    """What is on its way through a rank."""

    REQUEST = "request"  # through the gateway
    ITEM = "item"  # a picture, through the encoder router
    ENCODE = "encode"  # a picture, through an encoder rank
    PREFILL = "prefill"  # a prompt, through a prefill rank
    WRITE = "write"  # its KV, from there to decode
    DECODE = "decode"  # an answer, through a decode rank
    GENERATE = "generate"  # prompt and answer, through a language rank


class Hop(Part, frozen=True):
    """One stretch of a way: a state that it was in, or (``inner``) a piece of work within one."""

    kind: Kind
    request: RequestId
    attempt: int
    way: int  # a number of its own for each thing on its way through this rank
    name: str
    began: int
    ended: int | None  # None: it was there still when the recording ended
    item: int | None = None
    inner: bool = False
    text: str = ""


class HopList(Part, frozen=True):
    """All that one rank noted. ``left_out``: how many more there were than it keeps."""

    until: int
    hops: list[Hop]
    left_out: int = 0


class TraceSource(Part, frozen=True):
    """One rank's share of a merged trace. ``offset_us``: how far its clock is ahead of the supervisor's."""

    rank: RankName
    trace: str | None = None  # of its profiler
    hops: str | None = None
    offset_us: float = 0.0
    uncertainty_us: float | None = None  # None: nothing was measured
    note: str | None = None


class MergeOrder(Message, frozen=True):
    capture: str
    cluster: str
    began: int  # on the supervisor's clock
    path: str
    sources: list[TraceSource]  # in the order of their tracks


class MergedSource(Part, frozen=True):
    rank: RankName
    events: int = 0
    hops: int = 0
    left_out: int = 0
    error: str | None = None  # why there is no more of it
    note: str | None = None


class MergeReport(Message, frozen=True):
    """``backwards``: arrows whose end lies before their start by more than the clocks' uncertainty."""

    sources: list[MergedSource]
    arrows: int = 0
    backwards: int = 0
    error: str | None = None  # why there is no merged trace


MERGE_ORDER: Codec[MergeOrder] = Codec(MergeOrder)
MERGE_REPORT: Codec[MergeReport] = Codec(MergeReport)
HOP_LIST: msgspec.json.Decoder[HopList] = msgspec.json.Decoder(HopList)
