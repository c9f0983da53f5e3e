"""What each rank of a topology is told: from what was settled for all, its own section and its seat. Pure."""

from __future__ import annotations

import os

import msgspec

from epdctl.ids import LocalGpu, RankName, Stage
from epdctl.topology.hardware import Gpu
from epdctl.topology.plan import PlannedRank
from epdctl.topology.pools import memory_of
from epdctl.topology.schema import EncoderStage, LanguageStage, RoutedEncoderStage, StageSection, Topology
from epdctl.topology.seating import Seating
from epdctl.topology.settled import Settled
from epdctl.wire.config import EncoderConfig, EncoderHttp, EngineConfig, ModelConfig, RankConfig

__all__ = ["ranks_of"]

_MAX_GPU_THREADS = 4  # beside a GPU the CPU only launches kernels
_MAX_PREPROCESS_THREADS = 8


def ranks_of(topology: Topology, settled: Settled, seating: Seating) -> tuple[PlannedRank, ...]:
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


def _front(stage: Stage, encoder: RoutedEncoderStage | None, settled: Settled) -> RankConfig:
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


def _config(name: RankName, settled: Settled) -> RankConfig:
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


def _model_rank(name: RankName, section: StageSection, settled: Settled, gpu: Gpu | None) -> PlannedRank:
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
        prepared_bytes=section.prepared,
        canary_seconds=section.canary,
        canary_deadline=section.canary_deadline,
    )
