"""The encoder's own service around a tower that hashes: a real rank, whose restart costs no weights.

The model's name is the token of the slots' owner. A picture called ``hang`` holds the compute thread for ever.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import msgspec
import torch

from epdctl.encoder.canary import Canary
from epdctl.encoder.worker import EncoderService
from epdctl.engine.api import Prepared
from epdctl.ids import Modality
from epdctl.wire.config import ModelConfig, RankSpec
from epdctl.wire.encode import MediaItem

WIDTH = 16  # bytes of one row
HANG = b"hang"


def value(media: bytes | memoryview, rows: int) -> bytes:
    """What is made of a picture: WIDTH bytes for each row."""
    return b"".join(hashlib.blake2b(media, digest_size=WIDTH, salt=row.to_bytes(4)).digest() for row in range(rows))


def canary(model: ModelConfig) -> Canary:
    item = MediaItem(index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2], rows=1)
    return Canary(b"canary", item)


class HashTower:
    """Implements Tower."""

    width = WIDTH
    dtype = torch.uint8

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        """What is to become of it; nothing of what hangs."""
        data = bytearray() if bytes(media) == HANG else bytearray(value(media, item.rows))
        one, height, width = item.grid
        pixels = torch.empty(0, dtype=torch.uint8) if not data else torch.frombuffer(data, dtype=torch.uint8)
        return Prepared(grid=(one, height, width), rows=item.rows, patches=height * width, pixels=pixels)

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        if any(item.pixels.numel() == 0 for item in batch):
            threading.Event().wait()
        return [item.pixels.view(item.rows, WIDTH).clone() for item in batch]


class LightEncoder(EncoderService):
    def __init__(self, spec: RankSpec) -> None:
        told = msgspec.structs.replace(spec, token=spec.config.model.name)
        super().__init__(told, load=lambda _, __: HashTower(), canary=canary)


class SecondLifeOnly(LightEncoder):
    """Its first incarnation dies before it has said where it can be reached."""

    def __init__(self, spec: RankSpec) -> None:
        if spec.incarnation == 1:
            raise RuntimeError("before it connected")
        super().__init__(spec)
