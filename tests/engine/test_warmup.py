"""Warming up leaves an engine as it was: idle, and with the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from epdctl.engine.api import LanguageModel, Tower
from epdctl.engine.warmup import warm_up
from tests.engine.harness import Recorder, Run, question
from tests.engine.test_parity import one_picture
from tests.support.checkpoints import every_family

pytestmark = every_family


def test_what_comes_after_is_answered_the_same(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = question(one_picture, checkpoint, tower)
    run = Run.make(language, chunk_tokens=64)
    said: list[tuple[int, int]] = []
    warm_up(run.engine, lambda done, total: said.append((done, total)))
    assert said == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert not run.engine.has_work
    run.admit("only", asked)
    run.finish()
    assert run.answers["only"] == asked.reference.answer


@pytest.mark.parametrize("pages", [1, 2, 5, 9])
def test_a_small_pool_is_not_overrun(pages: int, language: LanguageModel) -> None:
    """Prompts are as long as a step may be, or as two that fit."""
    recorder = Recorder(language)
    run = Run.make(recorder, chunk_tokens=64, pages=pages)
    warm_up(run.engine, lambda done, total: None)
    answers = min(2, pages)
    assert sum(len(logits) for logits in recorder.logits) == 3 * 4 * answers
    assert not run.engine.has_work
