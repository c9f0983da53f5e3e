"""A family's tower through the fast one: on a CPU with plain steps put in place of the kernels, float32, exact."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from epdctl.bench.checkpoints import FAMILY
from epdctl.engine.api import Tower, WarmsUp
from epdctl.engine.fast import tower as fast
from epdctl.engine.fast.plain import PlainOps
from epdctl.engine.loading import load_tower
from epdctl.errors import LoadError, RequestError
from tests.engine.harness import media_item, pictures
from tests.support.checkpoints import model_config
from tests.support.reference import picture_bytes

CPU = torch.device("cpu")
SIZES = [(140, 140), (112, 168), (300, 90), (84, 84)]

of_both = pytest.mark.parametrize("checkpoint", [FAMILY, "qwen3_vl"], indirect=True, scope="session")


@pytest.fixture
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "kernels_for", lambda device, dtype: PlainOps())


def embeddings(tower: Tower, checkpoint: Path) -> list[torch.Tensor]:
    files = pictures(1, SIZES)
    batch = [tower.prepare(file, media_item(checkpoint, file, i, len(files))) for i, file in enumerate(files)]
    return tower.encode(batch)


@of_both
@pytest.mark.usefixtures("plain_steps")
def test_embeddings_and_deepstack_rows_are_the_librarys(checkpoint: Path) -> None:
    quick = load_tower(model_config(checkpoint), CPU)
    usual = load_tower(model_config(checkpoint, optimize="off"), CPU)
    files = pictures(1, SIZES)
    assert quick.prepare(files[0], media_item(checkpoint, files[0], 0, 1)).pixels.dtype == torch.uint8
    for found, due in zip(embeddings(quick, checkpoint), embeddings(usual, checkpoint), strict=True):
        assert found.shape[1] == quick.width
        torch.testing.assert_close(found, due, atol=1e-4, rtol=1e-4)
    assert isinstance(quick, WarmsUp)
    quick.warm_up(lambda done, total: None)


@pytest.mark.usefixtures("plain_steps")
def test_a_picture_lying_on_its_side_is_refused_as_ever(checkpoint: Path) -> None:
    """Resized to the promised grid it would be squeezed, and nobody would know."""
    tower = load_tower(model_config(checkpoint), CPU)
    promised = media_item(checkpoint, picture_bytes(1, 168, 84), 0, 1)
    with pytest.raises(RequestError, match="was sized for"):
        tower.prepare(picture_bytes(1, 84, 168), promised)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"optimize": "off"}, "off"), ({"attention": "sdpa"}, "attention is sdpa"), ({}, "no kernels for torch.float32")],
)
def test_why_a_tower_is_not_optimized_is_logged(
    changes: dict[str, str], why: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load_tower(model_config(checkpoint, **changes), CPU)
    assert any(why in message for message in caplog.messages)


def test_an_unknown_optimization_is_refused(checkpoint: Path) -> None:
    with pytest.raises(LoadError, match="no optimization 'turbo'"):
        load_tower(model_config(checkpoint, optimize="turbo"), CPU)
