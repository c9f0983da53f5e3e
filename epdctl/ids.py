"""Names and numbers that identify things, each with one type, so that a mix-up does not type-check."""

from __future__ import annotations

import enum
import re
import secrets
from collections.abc import Mapping
from typing import NewType

import msgspec

__all__ = [
    "Incarnation",
    "LocalGpu",
    "Modality",
    "PhysicalGpu",
    "RankName",
    "RequestId",
    "Room",
    "RunId",
    "Secret",
    "Stage",
    "new_room",
    "new_run_id",
]

RequestId = NewType("RequestId", str)
RunId = NewType("RunId", str)
Incarnation = NewType("Incarnation", int)  # 1 for a rank's first process
Room = NewType("Room", int)  # 0 <= room < 2**63
LocalGpu = NewType("LocalGpu", int)  # what torch counts inside one process, always from 0


class PhysicalGpu(msgspec.Struct, frozen=True):
    """One GPU (or MIG slice) of this machine. ``uuid`` is what goes into CUDA_VISIBLE_DEVICES."""

    index: int
    uuid: str

    def __str__(self) -> str:
        return f"{self.index}"


class Stage(enum.StrEnum):
    GATEWAY = "gateway"
    ENCODER_ROUTER = "encoder-router"
    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    LANGUAGE = "language"
    MONO = "mono"


class Modality(enum.StrEnum):
    """What a part of a request is, beside text."""

    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"

    @property
    def noun(self) -> str:
        """One of it, in messages for people; with an s, several."""
        return _NOUNS[self]


_NOUNS = {Modality.IMAGE: "picture", Modality.AUDIO: "sound clip", Modality.VIDEO: "video"}

TOWER_STAGES = frozenset({Stage.ENCODER, Stage.MONO})  # without one of them a cluster takes text only
# Whose memory a stage's ranks write to.
READERS: Mapping[Stage, frozenset[Stage]] = {
    Stage.ENCODER: frozenset({Stage.PREFILL, Stage.LANGUAGE}),
    Stage.PREFILL: frozenset({Stage.DECODE}),
}
MODEL_STAGES = frozenset({Stage.ENCODER, Stage.PREFILL, Stage.DECODE, Stage.LANGUAGE, Stage.MONO})

_RANK = re.compile(r"^(?P<stage>[a-z-]+)/(?P<replica>\d+)(?:\.(?P<shard>\d+))?$")


class RankName(str):
    """``stage/replica`` or ``stage/replica.shard``: how a person, a log line and a message name one rank."""

    __slots__ = ()

    def __new__(cls, text: str) -> RankName:
        match = _RANK.match(text)
        if match is None or match["stage"] not in set(Stage):
            raise ValueError(f"not a rank name: {text!r}")
        return super().__new__(cls, text)

    @classmethod
    def of(cls, stage: Stage, replica: int, shard: int | None = None) -> RankName:
        return cls(f"{stage}/{replica}" if shard is None else f"{stage}/{replica}.{shard}")

    @property
    def stage(self) -> Stage:
        return Stage(self.partition("/")[0])

    @property
    def replica(self) -> int:
        return int(self.partition("/")[2].partition(".")[0])

    @property
    def shard(self) -> int | None:
        shard = self.partition(".")[2]
        return int(shard) if shard else None

    @property
    def file_stem(self) -> str:
        """A file name of its own: ``encoder-0`` or ``prefill-0.1``."""
        return self.replace("/", "-")


class Secret(str):
    """Text that is used and never shown: whatever prints it prints asterisks."""

    __slots__ = ()

    def __str__(self) -> str:
        return "***"

    __repr__ = __str__

    def __format__(self, _: str) -> str:
        return "***"

    def reveal(self) -> str:
        return str.__str__(self)


def new_room() -> Room:
    return Room(secrets.randbits(63))


def new_run_id() -> RunId:
    return RunId(secrets.token_hex(8))
