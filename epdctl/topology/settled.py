"""What is settled for all ranks of a topology before any of them is told: model, limits, pools, transfer. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from epdctl.ids import Stage
from epdctl.topology.checkpoint import Checkpoint
from epdctl.topology.hardware import Hardware
from epdctl.topology.moving import Ends, Moving, moving
from epdctl.topology.pools import Pools, size_pools
from epdctl.topology.schema import LimitsSection, Topology, TopologyFile
from epdctl.topology.seating import Seating
from epdctl.wire.config import GatewayConfig, Limits, ModelConfig

__all__ = ["Settled", "settle"]

_ANSWERING = frozenset({Stage.DECODE, Stage.LANGUAGE, Stage.MONO})


@dataclass(frozen=True, slots=True)
class Settled:
    """What is the same for every rank, with nothing left at "auto"."""

    model: ModelConfig
    limits: Limits
    moving: Moving
    pools: Pools
    gateway: GatewayConfig
    heartbeat: float
    spare: int  # threads for each model rank, if all get the same


def settle(topology: Topology, checkpoint: Checkpoint, hardware: Hardware, seating: Seating) -> Settled:
    file = topology.file
    ranks = sum(section.ranks for _, section in file.stages.present())
    model = _model(topology, checkpoint, all_on_gpu=len(seating.seats) == ranks)
    pools = size_pools(file, checkpoint, model.dtype, seating.seats)
    return Settled(
        model=model,
        limits=_limits(file.limits, pools),
        pools=pools,
        moving=moving(file.transfer, Ends(ranks, seating.seats, file.stages.mono is not None), hardware),
        gateway=_gateway(file),
        heartbeat=file.deadlines.heartbeat,
        spare=max(1, hardware.cores // ranks),
    )


def _gateway(file: TopologyFile) -> GatewayConfig:
    section = file.gateway
    return GatewayConfig(
        host=section.host,
        port=section.port,
        stages=[stage for stage, _ in file.stages.present()],
        answering=sum(stage.ranks for name, stage in file.stages.present() if name in _ANSWERING),
        api_key=section.api_key,
        strict=section.strict,
        media_hosts=section.media_hosts,
        media_seconds=section.media_timeout,
    )


def _model(topology: Topology, checkpoint: Checkpoint, *, all_on_gpu: bool) -> ModelConfig:
    model = topology.file.model
    natural = (checkpoint.dtype or "bfloat16") if all_on_gpu else "float32"
    return ModelConfig(
        path=str(checkpoint.directory),
        name=model.name or checkpoint.name,
        family=checkpoint.family,
        dtype=natural if model.dtype == "auto" else model.dtype,
        attention=model.attention,
        residual=model.residual,
        image_processor="pil" if model.image_processor == "auto" else model.image_processor,
        revision=model.revision,
    )


def _limits(section: LimitsSection, pools: Pools) -> Limits:
    """No request may be longer than the smallest KV pool: it would wait for pages that never come free."""
    limits = section.model_dump()
    limits["max_context"] = min([section.max_context, *pools.kv_tokens.values()])
    return Limits(**limits)
