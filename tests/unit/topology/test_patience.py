"""How long a step may take before its rank counts as stuck."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epdctl.topology.plan import Deadlines
from epdctl.topology.weights import Weights
from tests.unit.topology.support import CHECKPOINT, machine, plan

STAGES = "model: {path: x}\nstages: {encoder: {batch_patches: 1000}, language: {chunk_tokens: 2000, threads: 2}}\n"
LARGE = replace(CHECKPOINT, weights=Weights(tower=10**9, language=8 * 10**9, kv=1024, row=64))


@pytest.mark.parametrize(
    ("text", "gpus", "stuck"),
    [
        (STAGES, 0, 2040.0),  # 2 · 2000 · 8e9 operations at 8e9 a second and thread, on two threads, in whole minutes
        (STAGES + "deadlines: {stuck: 90s}\n", 0, 90.0),
        (STAGES, 2, Deadlines().stuck),
        (STAGES.replace("2000", "20").replace("1000", "100"), 0, Deadlines().stuck),
    ],
    ids=["a large model on a CPU", "as it was said", "on GPUs", "small steps"],
)
def test_stuck_leaves_time_for_the_largest_step(text: str, gpus: int, stuck: float) -> None:
    made = plan(text, machine(gpus), checkpoint=LARGE)
    assert made.deadlines.stuck == stuck


def test_a_longer_stuck_is_said_with_its_reason() -> None:
    (note,) = [one for one in plan(STAGES, machine(), checkpoint=LARGE).notes if one.startswith("deadlines")]
    assert note == (
        "deadlines: stuck: 120 s → 34 min (language/0: 2000 tokens through 8.0 billion weights on 2 CPU threads)"
    )


def test_a_checkpoint_that_does_not_say_its_size_changes_nothing() -> None:
    assert plan(STAGES, machine()).deadlines == Deadlines()
