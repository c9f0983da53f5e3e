"""How large the pools of a plan are: as said, or what a GPU's share leaves; and whether they hold what may come.

Pure arithmetic over the sizes of a checkpoint. Where its files do not say them, what was said stands untested, and a
rank finds out when it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from epdctl.ids import RankName, Stage
from epdctl.topology.checkpoint import Checkpoint
from epdctl.topology.document import Trail
from epdctl.topology.hardware import Gpu
from epdctl.topology.schema import EncoderStage, LanguageStage, StageSection, TopologyFile
from epdctl.topology.seating import Complaint
from epdctl.wire.config import EngineConfig

__all__ = ["Pools", "Sum", "memory_of", "size_pools"]

GIB = 1 << 30
MIB = 1 << 20
SLOT_ALIGNMENT = 256  # bytes, of a slot in a pool
CONTEXT_BYTES = 3 << 29  # 1.5 GiB: what CUDA and its libraries take of a GPU before torch counts a byte
RESERVE_PART = 0.1  # of a share, for what a step computes with
RESERVE_BYTES = GIB  # and at least that

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TAKES_EMBEDDINGS = frozenset({Stage.PREFILL, Stage.LANGUAGE, Stage.MONO})


@dataclass(frozen=True, slots=True)
class Sum:
    """What one rank does with its part of a GPU, less its KV pool. Bytes."""

    share: int
    weights: int
    embeddings: int  # those that were written to it, and those that it remembers

    @property
    def reserve(self) -> int:
        return max(int(self.share * RESERVE_PART), RESERVE_BYTES)

    @property
    def left(self) -> int:
        return self.share - self.weights - self.embeddings - self.reserve

    def __str__(self) -> str:
        parts = (self.share, self.weights, self.embeddings, self.reserve)
        share, weights, embeddings, reserve = (f"{part / GIB:.1f}" for part in parts)
        return f"{share} GiB less weights {weights}, embeddings {embeddings}, computing {reserve}"


@dataclass(slots=True)
class Pools:
    """``kv_tokens``: of each rank of a stage with a KV pool, in whole pages. ``notes``: what was chosen."""

    kv_tokens: dict[Stage, int] = field(default_factory=dict)
    embedding_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    complaints: list[Complaint] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Given:
    """What the sizes are reckoned from. ``item``: bytes of one number."""

    file: TopologyFile
    checkpoint: Checkpoint
    item: int
    seats: Mapping[RankName, Gpu]

    def gpu(self, stage: Stage, section: StageSection) -> Gpu | None:
        """The smallest of the stage's; None when some of its ranks have none."""
        ranks = [RankName.of(stage, index) for index in range(section.ranks)]
        gpus = [self.seats[rank] for rank in ranks if rank in self.seats]
        return min(gpus, key=lambda gpu: gpu.memory_bytes) if len(gpus) == len(ranks) else None


def memory_of(gpu: Gpu, share: float) -> int:
    """Bytes of ``gpu`` that torch may take in a rank with this share of it."""
    return int(gpu.memory_bytes * share) - CONTEXT_BYTES


def size_pools(file: TopologyFile, checkpoint: Checkpoint, dtype: str, seats: Mapping[RankName, Gpu]) -> Pools:
    given = _Given(file, checkpoint, _ITEM_BYTES[dtype], seats)
    pools = Pools(embedding_bytes=file.transfer.embedding_pool)
    _size_embeddings(given, pools)
    for stage, section in file.stages.present():
        if isinstance(section, LanguageStage):
            _size_kv(given, stage, section, pools)
        elif (total := _sum(given, stage, section, pools)) is not None and total.left < 0:
            pools.complaints.append(Complaint(_share_trail(stage, section), f"too little of a GPU: {total}", _MORE))
    _note_unheld(given, pools)
    return pools


_MORE = "give it a larger share, or a larger GPU"


# -- embeddings --


def _size_embeddings(given: _Given, pools: Pools) -> None:
    """One medium, the largest there may be, must fit: a request with it would be refused by every rank."""
    weights, largest, limits = given.checkpoint.weights, given.checkpoint.largest, given.file.limits
    reader = any(stage in _TAKES_EMBEDDINGS for stage, _ in given.file.stages.present())
    served = given.file.stages.encoder or given.file.stages.mono
    if weights is None or largest is None or not reader or not served or not limits.max_media:
        return
    row = weights.row * given.item
    rows = min(largest.rows, _most_said(given))
    needed = -(-rows * row // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    if needed <= pools.embedding_bytes:
        return
    enough = -(-needed // MIB)
    why = f"{largest.what} becomes {largest.rows} embeddings of {row} bytes"
    if rows < largest.rows:
        why += f", and {rows} of them fit a prompt"
    if "embedding_pool" not in given.file.transfer.model_fields_set:
        pools.notes.append(f"transfer: embedding_pool: {pools.embedding_bytes // MIB}MiB → {enough}MiB ({why})")
        pools.embedding_bytes = enough * MIB
        return
    problem = f"a pool of {pools.embedding_bytes} bytes, but {why}: {needed} bytes"
    remedy = f"write embedding_pool: {enough}MiB or more, or lower limits.max_pixels"
    pools.complaints.append(Complaint(("transfer", "embedding_pool"), problem, remedy))


def _most_said(given: _Given) -> int:
    """Tokens of the longest prompt, as far as it was said."""
    sections = [section for _, section in given.file.stages.present() if isinstance(section, LanguageStage)]
    return min([given.file.limits.max_context, *(one.kv_tokens for one in sections if one.kv_tokens)])


# -- KV --


def _size_kv(given: _Given, stage: Stage, section: LanguageStage, pools: Pools) -> None:
    total, weights = _sum(given, stage, section, pools), given.checkpoint.weights
    page = section.page_size
    said = section.kv_tokens or (EngineConfig().kv_tokens if total is None else None)
    if total is None or weights is None:
        pools.kv_tokens[stage] = _whole_pages(said or EngineConfig().kv_tokens, page)
        return
    token = weights.kv * given.item
    fitting = _whole_pages(max(0, total.left) // token, page)
    usable = _whole_pages(given.file.limits.inflight * given.file.limits.max_context + page - 1, page)
    pools.kv_tokens[stage] = min(fitting, usable) if said is None else _whole_pages(said, page)
    if said is None:
        why = f"of {total}" if fitting <= usable else "limits.inflight times max_context: more is never used"
        pools.notes.append(f"{stage.value}: kv_tokens → {pools.kv_tokens[stage]} ({why})")
    if said is not None and said > fitting:
        left = max(0, total.left) / GIB
        problem = f"{said} tokens take {said * token / GIB:.1f} GiB, and {left:.1f} GiB are left: {total}"
        remedy = f"write kv_tokens: {fitting} or less, or give it a larger share" if fitting else _MORE
        pools.complaints.append(Complaint(("stages", stage.value, "kv_tokens"), problem, remedy))
    elif said is None and fitting < _least(given, page):
        problem = f"{fitting} tokens of KV are left, and a request may need {_least(given, page)}: {total}"
        pools.complaints.append(Complaint(_share_trail(stage, section), problem, _MORE))


def _least(given: _Given, page: int) -> int:
    """Tokens of a pool that is worth having: max_context gives way only where nobody wrote it."""
    limits = given.file.limits
    return limits.max_context if "max_context" in limits.model_fields_set else page


def _whole_pages(tokens: int, page: int) -> int:
    return tokens // page * page


def _sum(given: _Given, stage: Stage, section: StageSection, pools: Pools) -> Sum | None:
    """None for ranks on CPUs, whose pools are bounded by what their host has, and where sizes are not known."""
    gpu, weights = given.gpu(stage, section), given.checkpoint.weights
    if gpu is None or weights is None:
        return None
    halves = {Stage.ENCODER: weights.tower, Stage.MONO: weights.tower + weights.language}
    embeddings = pools.embedding_bytes if stage in _TAKES_EMBEDDINGS else 0
    remembered = section.cache if isinstance(section, EncoderStage) else 0
    share = memory_of(gpu, section.share or 1.0)
    return Sum(share, halves.get(stage, weights.language) * given.item, embeddings + remembered)


def _share_trail(stage: Stage, section: StageSection) -> Trail:
    return ("stages", stage.value) if section.share is None else ("stages", stage.value, "share")


def _note_unheld(given: _Given, pools: Pools) -> None:
    largest = given.checkpoint.largest
    if largest is None or not pools.kv_tokens or not (given.file.stages.encoder or given.file.stages.mono):
        return
    context = min(given.file.limits.max_context, *pools.kv_tokens.values())
    if largest.rows >= context:
        told = f"{largest.what} becomes {largest.rows} tokens, beyond max_context {context}, and is refused"
        pools.notes.append(f"limits: {told}")
