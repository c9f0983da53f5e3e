"""The kernels on videos. In a file of its own: while a cluster is up, its test's process opens no device."""

from __future__ import annotations

import pytest
import torch

from epdctl.engine.api import Tower
from epdctl.engine.families.videos import Videos
from epdctl.engine.loading import load_tower
from epdctl.families.qwen2_5_vl import Qwen25VL
from tests.engine.harness import media_item
from tests.support.checkpoints import model_config, tiny_checkpoint
from tests.support.reference import picture_bytes
from tests.support.videos import promised, video_bytes

pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_the_kernels_take_videos_beside_pictures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In one batch, in 16 bits; no further from float32 than transformers' own 16-bit forward is."""
    model = tiny_checkpoint(tmp_path_factory)
    gpu = torch.device("cuda", 0)
    film, picture = video_bytes(5, 90, 30, (168, 112)), picture_bytes(5, 140, 84)
    prepared = Videos(model_config(model), Qwen25VL(model)).prepare(film, promised(model, film))

    def encoded(tower: Tower) -> list[torch.Tensor]:
        seen = tower.prepare(picture, media_item(model, picture, 0, 1))
        return [each.float().cpu() for each in tower.encode([prepared, seen, prepared])]

    exact = encoded(load_tower(model_config(model), torch.device("cpu")))
    usual = encoded(load_tower(model_config(model, dtype="bfloat16", optimize="off"), gpu))
    quick = encoded(load_tower(model_config(model, dtype="bfloat16"), gpu))
    for found, plain, due in zip(quick, usual, exact, strict=True):
        noise = float((plain - due).norm() / due.norm())
        assert float((found - due).norm() / due.norm()) < 1.5 * noise
        assert noise < 0.1
