"""Ranks with a fault that no error and no count shows: only an answer does."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from epdctl.encoder.worker import EncoderService
from epdctl.engine.api import Prepared, Tower
from epdctl.engine.loading import load_tower
from epdctl.ids import RequestId
from epdctl.mono.service import MonoService
from epdctl.rank.machine import Machine
from epdctl.wire.config import ModelConfig, RankSpec
from epdctl.wire.encode import EncodeItem, MediaItem, RouterToWorker
from epdctl.wire.sockets import Sender

BLIND = "blind"


class BlindTower:
    """Sees the first batch, which proves the rank ready, and makes zeros of what comes once ``blind`` says so."""

    def __init__(self, tower: Tower, blind: Callable[[], bool] = lambda: True) -> None:
        self._tower = tower
        self._blind = blind
        self._proved = False

    @property
    def width(self) -> int:
        return self._tower.width

    @property
    def dtype(self) -> torch.dtype:
        return self._tower.dtype

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        return self._tower.prepare(media, item)

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        embeddings = self._tower.encode(batch)
        if self._proved and self._blind():
            return [torch.zeros_like(embedding) for embedding in embeddings]
        self._proved = True
        return embeddings


def load_blind(model: ModelConfig, device: torch.device) -> Tower:
    return BlindTower(load_tower(model, device))


def load_blind_later(model: ModelConfig, device: torch.device) -> Tower:
    """Blind from the moment on that a file BLIND lies beside the weights."""
    return BlindTower(load_tower(model, device), Path(model.path, BLIND).exists)


MARK = b"to be swapped"


def marked(picture: bytes) -> bytes:
    """The same PNG with a word beside it, which is one of the two that SwappingEncoder swaps."""
    file, text = io.BytesIO(), PngInfo()
    text.add_text("Comment", MARK.decode())
    with Image.open(io.BytesIO(picture)) as image:
        image.save(file, "PNG", pnginfo=text)
    return file.getvalue()


class SwappingEncoder(EncoderService):
    """Gives two pictures of a request each other's places: those that are marked, or both where there are two. They
    have one size."""

    def __init__(self, spec: RankSpec, *, beside: Machine | None = None) -> None:
        super().__init__(spec, beside=beside)
        self._held: dict[tuple[RequestId, int], tuple[Sender, EncodeItem, list[memoryview]]] = {}

    def _arrived(self, router: Sender, message: RouterToWorker, frames: list[memoryview]) -> None:
        if not isinstance(message, EncodeItem) or not (message.job.item.of == 2 or MARK in bytes(frames[0])):
            super()._arrived(router, message, frames)
            return
        key = message.job.request, message.job.attempt
        if key not in self._held:
            self._held[key] = router, message, frames
            return
        sender, earlier, picture = self._held.pop(key)
        super()._arrived(sender, _showing(earlier, message), frames)
        super()._arrived(router, _showing(message, earlier), picture)


def _showing(place: EncodeItem, other: EncodeItem) -> EncodeItem:
    """The item of one place with the picture of the other: what is remembered goes by the picture."""
    item = msgspec.structs.replace(place.job.item, content_hash=other.job.item.content_hash)
    return msgspec.structs.replace(place, job=msgspec.structs.replace(place.job, item=item))


def blind(spec: RankSpec) -> MonoService:
    return MonoService(spec, encoder=lambda part, beside: EncoderService(part, load=load_blind, beside=beside))


def blind_later(spec: RankSpec) -> MonoService:
    return MonoService(spec, encoder=lambda part, beside: EncoderService(part, load=load_blind_later, beside=beside))


def swapping(spec: RankSpec) -> MonoService:
    return MonoService(spec, encoder=lambda part, beside: SwappingEncoder(part, beside=beside))
