"""Machines and topologies made up for these tests."""

from __future__ import annotations

from pathlib import Path

from epdctl.errors import TopologyError
from epdctl.ids import PhysicalGpu
from epdctl.topology.checkpoint import Checkpoint
from epdctl.topology.hardware import Gpu, Hardware
from epdctl.topology.load import Draft, draft, draft_of
from epdctl.topology.placement import place
from epdctl.topology.plan import Plan, PlannedRank
from epdctl.topology.schema import Topology

CHECKPOINT = Checkpoint(Path("/models/tiny"), "tiny", "qwen2_5_vl", "bfloat16")
UUIDS = tuple(f"GPU-{digit * 8}-0000-0000-0000-000000000000" for digit in "01234567")


def gpu(index: int, uuid: str | None = None, mig_parent: str | None = None) -> Gpu:
    return Gpu(PhysicalGpu(index, uuid or UUIDS[index]), "NVIDIA H200", 141 << 30, mig_parent)


def machine(gpus: int = 0, cores: int = 16) -> Hardware:
    return Hardware(tuple(gpu(index) for index in range(gpus)), cores)


def load(path: Path, environ: dict[str, str]) -> Topology:
    return faultless(draft(path, environ))


def loads(source: str, text: str, environ: dict[str, str]) -> Topology:
    return faultless(draft_of(source, text, environ))


def faultless(made: Draft) -> Topology:
    """Raises TopologyError with every mistake."""
    if made.mistakes or made.topology is None:
        raise TopologyError(made.mistakes)
    return made.topology


def plan(
    text: str, hardware: Hardware, ports_in_use: dict[int, str] | None = None, checkpoint: Checkpoint = CHECKPOINT
) -> Plan:
    return place(loads("test.yaml", text, {}), checkpoint, hardware, ports_in_use)


def rank(made: Plan, name: str) -> PlannedRank:
    return next(planned for planned in made.ranks if planned.rank == name)


def seats(made: Plan) -> dict[str, str]:
    """Which GPU every model rank got, by index; "cpu" for none."""
    return {
        str(planned.rank): ",".join(str(one) for one in planned.gpus) or "cpu"
        for planned in made.ranks
        if planned.stage not in ("gateway", "encoder-router")
    }
