"""The same engine on a GPU: float32 answers as the CPU's reference does; packed attention as picture by picture."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epdctl.engine.api import Tower
from epdctl.engine.loading import load_language, load_tower
from epdctl.engine.sampler import draw
from epdctl.engine.settings import Ask
from epdctl.engine.varlen import VARLEN
from tests.engine.harness import Case, ask, media_item, pictures, question
from tests.engine.test_parity import eight_pictures, long_prompt, no_picture, three_between_text
from tests.support.checkpoints import model_config
from tests.unit.engine.test_sampler import some_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = torch.device("cuda", 0)
SIZES = [(140, 140), (112, 168), (300, 90), (84, 84)]


@pytest.mark.parametrize("build", [no_picture, three_between_text, eight_pictures, long_prompt])
def test_the_answer_is_that_of_generate_on_the_cpu(build: Callable[[int], Case], checkpoint: Path) -> None:
    model = model_config(checkpoint)
    asked = question(build, checkpoint, load_tower(model, GPU))
    language = load_language(model, GPU)
    assert ask(language, asked) == asked.reference.answer
    assert ask(language, asked, chunk_tokens=33) == asked.reference.answer


def test_packed_attention_is_chosen_and_gives_the_same_embeddings(checkpoint: Path) -> None:
    found = {}
    for attention in ("auto", "sdpa"):
        tower: Any = load_tower(model_config(checkpoint, dtype="bfloat16", attention=attention), GPU)
        found[attention] = embeddings(tower, checkpoint)
        chosen = tower.module.model.visual.config._attn_implementation
        assert chosen == (VARLEN if attention == "auto" else "sdpa")
    exact = embeddings(load_tower(model_config(checkpoint), GPU), checkpoint)
    for packed, split, due in zip(found["auto"], found["sdpa"], exact, strict=True):
        noise = float((split - due).norm() / due.norm())
        assert float((packed - due).norm() / due.norm()) < 2 * noise
        assert noise < 0.1


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_tokens_are_drawn_as_on_the_cpu(spread: float) -> None:
    choose = random.Random(3)
    logits = spread * torch.randn(40, 20_000, generator=torch.Generator().manual_seed(5))
    asks = [Ask(some_settings(choose), choose.choices(range(20_000), k=choose.randrange(1, 99))) for _ in logits]
    assert [each.token for each in draw(logits.to(GPU), asks)] == [each.token for each in draw(logits, asks)]


def embeddings(tower: Tower, checkpoint: Path) -> list[torch.Tensor]:
    files = pictures(1, SIZES)
    batch = [tower.prepare(file, media_item(checkpoint, file, 0, 1)) for file in files]
    return [each.float().cpu() for each in tower.encode(batch)]
