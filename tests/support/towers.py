"""A vision tower of arithmetic, for tests of what is around the tower."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from epdctl.encoder.canary import Canary
from epdctl.engine.api import Prepared
from epdctl.errors import RequestError
from epdctl.ids import Modality
from epdctl.wire.config import ModelConfig
from epdctl.wire.encode import MediaItem

WIDTH = 6
CANARY_SEED = 77


def picture(rows: int, seed: int) -> bytes:
    """What ToyTower takes for a picture; padded, so that it travels as real ones do, without a copy."""
    return f"{rows} {seed} ".encode().ljust(70_000, b".")


def embedding(rows: int, seed: int) -> torch.Tensor:
    """What ToyTower makes of it: [rows, WIDTH]."""
    return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH) + 1000 * seed


def toy_canary(model: ModelConfig) -> Canary:
    item = MediaItem(index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2], rows=1)
    return Canary(picture(1, CANARY_SEED), item)


class ToyTower:
    """``gate`` holds every forward until it is set; ``batches`` are the seeds of each forward that began.

    The canary passes by the gate and the batches; ``canary`` is what is made of it, or raises.
    """

    width = WIDTH
    dtype = torch.float32

    def __init__(self, *, gate: threading.Event | None = None, began: Callable[[], None] = lambda: None) -> None:
        self.gate = gate
        self.began = began
        self.batches: list[list[int]] = []
        self.canary: Callable[[], torch.Tensor] = lambda: embedding(1, CANARY_SEED)

    def prepare(self, media: bytes | memoryview, item: MediaItem) -> Prepared:
        text = bytes(media).rstrip(b".").decode()
        if text == "torn":
            raise RequestError(400, "the picture is torn")
        if text == "bug":
            raise ZeroDivisionError("in the image library")
        rows, seed = map(int, text.split())
        return Prepared(grid=(1, 2, 2 * rows), rows=rows, patches=4 * rows, pixels=torch.full((4 * rows, 1), seed))

    def encode(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        seeds = [int(item.pixels[0, 0]) for item in batch]
        if seeds == [CANARY_SEED]:
            return [self.canary()]
        self.batches.append(seeds)
        self.began()
        if self.gate is not None and not self.gate.wait(60):
            raise TimeoutError("the test never opened the gate")
        if 666 in seeds:
            raise RuntimeError("a kernel failed")
        return [embedding(item.rows, seed) for item, seed in zip(batch, seeds, strict=True)]

    def load(self, model: ModelConfig, device: torch.device) -> ToyTower:
        return self
