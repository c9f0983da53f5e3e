"""How long one piece of work may take before its rank counts as stuck. Pure arithmetic.

On a GPU the default is ample. On a CPU one chunk of a large model may take longer than that, and a rank that is killed
in the middle of its only step would be killed for ever: there the default grows with the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from epdctl.ids import TOWER_STAGES, Stage
from epdctl.topology.plan import Deadlines, PlannedRank
from epdctl.topology.schema import DeadlinesSection
from epdctl.topology.weights import Weights

__all__ = ["SLOWEST", "patient"]

SLOWEST = 8e9  # operations a second of one CPU thread: a tenth of what an idle core does (measured: 92e9, float32)
_LANGUAGE = frozenset({Stage.PREFILL, Stage.DECODE, Stage.LANGUAGE, Stage.MONO})


def patient(
    said: DeadlinesSection, ranks: Sequence[PlannedRank], weights: Weights | None
) -> tuple[Deadlines, list[str]]:
    """The deadlines, and a note where ``stuck`` was left to us and is not its default."""
    deadlines = Deadlines(**said.model_dump())
    if weights is None or "stuck" in said.model_fields_set:
        return deadlines, []
    seconds, why = max((step for rank in ranks for step in _steps(rank, weights)), default=(0.0, ""))
    if seconds <= deadlines.stuck:
        return deadlines, []
    minutes = math.ceil(seconds / 60)
    note = f"deadlines: stuck: {deadlines.stuck:g} s → {minutes} min ({why})"
    return replace(deadlines, stuck=60.0 * minutes), [note]


def _steps(rank: PlannedRank, weights: Weights) -> Iterator[tuple[float, str]]:
    """Seconds that the largest steps of a CPU rank take at the most: two operations for each weight and row."""
    config = rank.config
    if rank.gpus:
        return
    rows = []
    if rank.stage in _LANGUAGE:
        rows.append((min(config.engine.chunk_tokens, config.limits.max_context), weights.language, "tokens"))
    if rank.stage in TOWER_STAGES:
        rows.append((config.encoder.batch_patches, weights.tower, "patches"))
    for count, size, what in rows:
        threads = f"{config.threads} CPU thread" + ("s" if config.threads > 1 else "")
        why = f"{rank.rank}: {count} {what} through {size / 1e9:.1f} billion weights on {threads}"
        yield 2.0 * count * size / (SLOWEST * config.threads), why
