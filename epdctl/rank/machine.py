"""What stands in a rank with a language model once it has started: compute thread, engine, KV pages, transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from epdctl.engine.kv import KvPool, Memory
from epdctl.engine.pages import PageAllocator
from epdctl.ids import READERS
from epdctl.rank.compute import ComputeThread
from epdctl.rank.device import prepare_device
from epdctl.rank.profile import Profiler
from epdctl.rank.service import Progress
from epdctl.rank.stepper import Results, StepEngine, Stepper
from epdctl.transfer.base import Transport
from epdctl.wire.config import RankConfig, RankSpec

__all__ = ["NATIVE", "Loaded", "Machine", "Parts"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """``width``: values of one embedding row, as the engine takes it."""

    engine: StepEngine
    kv: KvPool
    width: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What a rank is made of. ``engine`` runs on the compute thread and takes as long as it takes.

    Its KV pool is made of what the transport allocates, so that peers can reach it.
    """

    engine: Callable[[RankConfig, Progress, Memory], Loaded]
    transport: Callable[[RankSpec], Transport]


@dataclass(frozen=True, slots=True)
class Machine:
    loaded: Loaded
    pages: PageAllocator
    stepper: Stepper
    transport: Transport
    compute: ComputeThread
    profiler: Profiler

    @classmethod
    async def start(cls, spec: RankSpec, parts: Parts, progress: Progress, results: Results) -> Machine:
        """Raises LoadError, with nothing left behind."""
        compute = ComputeThread()
        try:
            transport = parts.transport(spec)
        except BaseException:
            await compute.close()
            raise
        try:
            loaded = await compute.run(lambda: parts.engine(spec.config, progress, transport.allocate))
        except BaseException:
            await compute.close()
            await transport.close()
            raise
        profiler = Profiler(compute)

        writes = spec.config.stage in READERS

        def after_step() -> object | None:
            made = transport.made() if writes else None
            profiler.step()
            return made

        return cls(
            loaded=loaded,
            pages=PageAllocator(loaded.kv.pages),
            stepper=Stepper(loaded.engine, compute, results, after_step),
            transport=transport,
            compute=compute,
            profiler=profiler,
        )

    @property
    def page_size(self) -> int:
        return self.loaded.kv.layout.page_size

    async def close(self) -> None:
        """The thread first: after it nobody touches the memory that the transport knows."""
        self.stepper.stop()
        await self.compute.close()
        await self.transport.close()


def _native_engine(config: RankConfig, progress: Progress, memory: Memory) -> Loaded:
    from epdctl.engine.core import build_engine  # torch and transformers: seconds, and in the compute thread

    engine = build_engine(config.model, config.engine, prepare_device(config), progress, memory)
    return Loaded(engine, engine.kv, engine.language.row_width)


def _open_transport(spec: RankSpec) -> Transport:
    from epdctl.transfer.open import open_transport

    return open_transport(spec.config.transfer, spec)


NATIVE = Parts(_native_engine, _open_transport)
