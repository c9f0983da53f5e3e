"""What the ranks of an encoder's measurement are told, and what they tell: files, for they are no part of a cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from epdctl.ids import RankName

__all__ = ["FOLDER", "Orders", "Outcome", "Phase", "Row", "outcomes_of", "report"]

FOLDER = "EPDCTL_BENCH_ORDERS"  # environment variable: the directory of both


class Phase(msgspec.Struct, frozen=True):
    """``inflight`` pictures of ``side`` × ``side`` at any time, for ``seconds`` once ``warm`` of them have passed.

    ``decoded``: the encoder is spared the preprocessing; it takes one picture for all.
    """

    name: str
    side: int
    inflight: int
    seconds: float
    warm: float
    decoded: bool = False


class Row(msgspec.Struct, frozen=True):
    """Of an embedding."""

    width: int
    dtype: str
    itemsize: int


class Outcome(msgspec.Struct, frozen=True):
    """Of one phase, as one client saw it."""

    name: str
    pictures: int
    seconds: float
    p50_ms: float
    p99_ms: float
    checked: int  # embeddings held against the first one of the same picture


class Orders(msgspec.Struct, frozen=True):
    size: str  # of towers.py
    encoders: int
    row: Row
    phases: list[Phase]

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> Orders:
        return msgspec.json.decode((Path(environ[FOLDER]) / "orders.json").read_bytes(), type=cls)

    def write(self, folder: Path) -> None:
        (folder / "orders.json").write_bytes(msgspec.json.encode(self))


def _outcome_file(folder: Path, rank: RankName) -> Path:
    return folder / f"{rank.file_stem}.json"


def report(outcomes: list[Outcome], rank: RankName, environ: Mapping[str, str] = os.environ) -> None:
    """Whole or not at all."""
    file = _outcome_file(Path(environ[FOLDER]), rank)
    fresh = file.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(outcomes))
    fresh.replace(file)


def outcomes_of(folder: Path, rank: RankName) -> list[Outcome] | None:
    try:
        return msgspec.json.decode(_outcome_file(folder, rank).read_bytes(), type=list[Outcome])
    except FileNotFoundError:
        return None
