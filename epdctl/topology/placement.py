"""A topology on a machine: which ranks there are, where each runs, with how many threads. Pure and deterministic.

What a rank's command and environment are is the adapter's business.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from epdctl.errors import PlacementError
from epdctl.ids import LocalGpu, RankName, Stage
from epdctl.topology.checkpoint import Checkpoint
from epdctl.topology.document import Trail
from epdctl.topology.hardware import Gpu, Hardware
from epdctl.topology.moving import Ends, Moving, moving
from epdctl.topology.patience import patient
from epdctl.topology.plan import Plan, PlannedRank, RestartMode, RestartPolicy
from epdctl.topology.pools import Pools, memory_of, size_pools
from epdctl.topology.schema import (
    EncoderStage,
    LanguageStage,
    LimitsSection,
    RoutedEncoderStage,
    StageSection,
    Topology,
    TopologyFile,
)
from epdctl.topology.seating import Complaint, Seating, seat, wishes_of
from epdctl.wire.config import (
    EncoderConfig,
    EncoderHttp,
    EngineConfig,
    GatewayConfig,
    Limits,
    ModelConfig,
    RankConfig,
)

__all__ = ["listeners", "place"]

_MAX_GPU_THREADS = 4  # beside a GPU the CPU only launches kernels
_MAX_PREPROCESS_THREADS = 8
_SEATED_BY = ("gpus", "share", "replicas", "dp")
_ANSWERING = frozenset({Stage.DECODE, Stage.LANGUAGE, Stage.MONO})


@dataclass(frozen=True, slots=True)
class _Settled:
    """What is the same for every rank, with nothing left at "auto"."""

    model: ModelConfig
    limits: Limits
    moving: Moving
    pools: Pools
    gateway: GatewayConfig
    heartbeat: float
    spare: int  # threads for each model rank, if all get the same


def place(
    topology: Topology, checkpoint: Checkpoint, hardware: Hardware, ports_in_use: Mapping[int, str] | None = None
) -> Plan:
    """``ports_in_use``: port of the topology → what is with it. Raises PlacementError with all that fails, less what
    rests on a field that is in doubt."""
    on_cpu = {stage for stage, section in topology.file.stages.present() if _runs_on_cpu(section, hardware)}
    wishes = [
        wish
        for stage, section in topology.file.stages.present()
        if stage not in on_cpu
        for wish in wishes_of(stage, section)
    ]
    seating = seat(wishes, hardware.gpus)
    settled = _settle(topology, checkpoint, hardware, seating)
    complaints = [
        *seating.complaints,
        *settled.moving.complaints,
        *settled.pools.complaints,
        *_port_complaints(topology, ports_in_use or {}),
        *_attention_complaints(settled.model, on_cpu),
    ]
    if certain := [one for one in complaints if not topology.doubts(*_grounds(topology, one))]:
        raise PlacementError.of([topology.document.mistake(one.trail, one.problem, one.remedy) for one in certain])
    ranks = _ranks(topology, settled, seating)
    deadlines, waits = patient(topology.file.deadlines, ranks, checkpoint.weights)
    return Plan(
        cluster=topology.cluster,
        source=topology.source,
        adapter=topology.file.adapter,
        ranks=ranks,
        restart=_restart(topology),
        deadlines=deadlines,
        notes=(*hardware.notes, *_notes(topology, settled, hardware, on_cpu), *waits, *_thread_notes(ranks, hardware)),
    )


def _runs_on_cpu(section: StageSection, hardware: Hardware) -> bool:
    """Said with ``gpus: none``; assumed where nothing was said and there is no GPU."""
    return section.gpus == "none" or (section.gpus is None and section.share is None and not hardware.gpus)


def listeners(file: TopologyFile) -> list[tuple[Trail, str, int]]:
    """Every TCP port of the topology: where it stands in the file, its address, the port."""
    http = file.stages.encoder.http if file.stages.encoder else None
    ports: list[tuple[Trail, str, int]] = []
    if file.stages.fronted:
        ports.append((("gateway", "port"), file.gateway.host, file.gateway.port))
    if http is not None:
        ports.append((("stages", "encoder", "http", "port"), http.host, http.port))
    return ports


def _port_complaints(topology: Topology, ports_in_use: Mapping[int, str]) -> list[Complaint]:
    return [
        Complaint(trail, f"port {port} of {host} is {ports_in_use[port]}", "stop that, or write another port")
        for trail, host, port in listeners(topology.file)
        if port in ports_in_use
    ]


def _attention_complaints(model: ModelConfig, on_cpu: set[Stage]) -> list[Complaint]:
    towers = {Stage.ENCODER: "the encoder", Stage.MONO: "mono"}
    where = next((f"{name} runs on the CPU" for stage, name in towers.items() if stage in on_cpu), None)
    if model.dtype == "float32":
        where = where or "dtype is float32"
    if model.attention != "varlen" or where is None:
        return []
    return [Complaint(("model", "attention"), f"varlen needs a GPU and 16-bit numbers, but {where}", "write auto")]


def _grounds(topology: Topology, complaint: Complaint) -> list[Trail]:
    """The fields that ``complaint`` follows from: who gets which GPU follows from the wishes of all stages."""
    if complaint.trail[0] != "stages":
        return [complaint.trail]
    stages = [stage for stage, _ in topology.file.stages.present()]
    return [complaint.trail, *(("stages", stage, field) for stage in stages for field in _SEATED_BY)]


def _settle(topology: Topology, checkpoint: Checkpoint, hardware: Hardware, seating: Seating) -> _Settled:
    file = topology.file
    ranks = sum(section.ranks for _, section in file.stages.present())
    model = _model(topology, checkpoint, all_on_gpu=len(seating.seats) == ranks)
    pools = size_pools(file, checkpoint, model.dtype, seating.seats)
    return _Settled(
        model=model,
        limits=_limits(file.limits, pools),
        pools=pools,
        moving=moving(
            file.transfer, Ends(ranks, tuple(seating.seats.values()), file.stages.mono is not None), hardware
        ),
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


def _ranks(topology: Topology, settled: _Settled, seating: Seating) -> tuple[PlannedRank, ...]:
    stages = list(topology.file.stages.present())
    front = [Stage.GATEWAY] if topology.file.stages.fronted else []
    if topology.file.stages.encoder:
        front.append(Stage.ENCODER_ROUTER)
    ranks = [PlannedRank(_front(stage, topology.file.stages.encoder, settled)) for stage in front]
    for stage, section in stages:
        for index in range(section.ranks):
            name = RankName.of(stage, index)
            ranks.append(_model_rank(name, section, settled, seating.seats.get(name)))
    return tuple(ranks)


def _front(stage: Stage, encoder: RoutedEncoderStage | None, settled: _Settled) -> RankConfig:
    config = _config(RankName.of(stage, 0), settled)
    if stage is not Stage.ENCODER_ROUTER or encoder is None:
        return config
    return msgspec.structs.replace(config, encoder=_routed(encoder, settled.spare))


def _routed(section: RoutedEncoderStage, spare: int) -> EncoderConfig:
    """What the router has to know of the ranks behind it."""
    http = section.http
    surface = (
        None
        if http is None
        else EncoderHttp(
            port=http.port,
            host=http.host,
            token_file=_absolute(http.token_file),
            strict=http.strict,
            profiles=_absolute(http.profiles),
            held_bytes=http.held,
        )
    )
    return msgspec.structs.replace(_encoder(section, spare), ranks=section.ranks, http=surface)


def _absolute(path: str | None) -> str | None:
    """Seen from where epdctl is run: ranks are run from elsewhere."""
    return None if path is None else os.path.abspath(os.path.expanduser(path))


def _config(name: RankName, settled: _Settled) -> RankConfig:
    return RankConfig(
        rank=name,
        stage=name.stage,
        service="",
        model=settled.model,
        limits=settled.limits,
        transfer=msgspec.structs.replace(settled.moving.config, embedding_bytes=settled.pools.embedding_bytes),
        gateway=settled.gateway,
        heartbeat_seconds=settled.heartbeat,
    )


def _model_rank(name: RankName, section: StageSection, settled: _Settled, gpu: Gpu | None) -> PlannedRank:
    default = settled.spare if gpu is None else min(settled.spare, _MAX_GPU_THREADS)
    shared = _config(name, settled)
    config = msgspec.structs.replace(
        shared,
        model=_optimized(shared.model, section),
        threads=section.threads or default,
        devices=[] if gpu is None else [LocalGpu(0)],
        share=section.share or 1.0,
        memory_bytes=0 if gpu is None or section.share is None else memory_of(gpu, section.share),
        engine=_engine(section, settled.pools.kv_tokens.get(name.stage)),
        encoder=_encoder(section, settled.spare),
    )
    return PlannedRank(config, gpus=() if gpu is None else (gpu.physical,))


def _optimized(model: ModelConfig, section: StageSection) -> ModelConfig:
    return msgspec.structs.replace(model, optimize=section.optimize) if isinstance(section, EncoderStage) else model


def _engine(section: StageSection, kv_tokens: int | None) -> EngineConfig:
    if not isinstance(section, LanguageStage) or kv_tokens is None:
        return EngineConfig()
    return EngineConfig(
        page_size=section.page_size,
        kv_tokens=kv_tokens,
        chunk_tokens=section.chunk_tokens,
        max_batch=section.max_batch,
    )


def _encoder(section: StageSection, spare: int) -> EncoderConfig:
    if not isinstance(section, EncoderStage):
        return EncoderConfig()
    threads = section.preprocess_threads or min(spare, _MAX_PREPROCESS_THREADS)
    return EncoderConfig(
        batch_patches=section.batch_patches,
        preprocess_threads=threads,
        cache_bytes=section.cache,
        canary_seconds=section.canary,
        canary_deadline=section.canary_deadline,
    )


def _restart(topology: Topology) -> RestartPolicy:
    values = topology.file.restart.model_dump()
    return RestartPolicy(**values | {"mode": RestartMode(values["mode"])})


def _notes(topology: Topology, settled: _Settled, hardware: Hardware, on_cpu: set[Stage]) -> list[str]:
    """Every choice made on the user's behalf."""
    file = topology.file
    unsaid = [(stage, section) for stage, section in file.stages.present() if section.gpus is None]
    chosen = [
        ("model: dtype", file.model.dtype, settled.model.dtype),
        ("model: image_processor", file.model.image_processor, settled.model.image_processor),
    ]
    notes = [f"{what}: auto → {choice}" for what, said, choice in chosen if said == "auto"]
    if settled.moving.note is not None:
        notes.append(settled.moving.note)
    notes += settled.pools.notes
    for where, stages in (
        ("none (this machine shows no GPU)", [stage for stage, _ in unsaid if stage in on_cpu]),
        (f"auto ({len(hardware.gpus)} visible)", [stage for stage, _ in unsaid if stage not in on_cpu]),
    ):
        if stages:
            notes.append(f"{', '.join(stages)}: gpus → {where}")
    if settled.limits.max_context != file.limits.max_context:
        kept = settled.limits.max_context
        notes.append(f"limits: max_context: {file.limits.max_context} → {kept}, what the smallest KV pool holds")
    return notes


def _thread_notes(ranks: tuple[PlannedRank, ...], hardware: Hardware) -> list[str]:
    """More compute threads than cores make every step many times slower, so it is said."""
    busy = sum(rank.config.threads for rank in ranks if rank.config.stage not in (Stage.GATEWAY, Stage.ENCODER_ROUTER))
    if busy <= hardware.cores or all(rank.config.threads == 1 for rank in ranks):
        return []
    return [f"threads: {busy} compute threads on {hardware.cores} cores; steps will wait for each other"]
