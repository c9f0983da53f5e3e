"""Bytes by Mooncake's engine: TCP, RDMA, or NVLink within a host. Which one is said by the plan.

The engine asks nobody for the cluster's token: whoever reaches its port is told by the engine itself where memory is
registered, and may read and write it. So every user of this host can; what keeps other hosts out: mooncake_engine.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

import torch

from epdctl.errors import RegistrationFailed, UserError
from epdctl.transfer.landing import Owner
from epdctl.transfer.mooncake_engine import PROTOCOLS, Engine, engine_of, probe
from epdctl.transfer.movers import DeviceOrder, Put
from epdctl.transfer.onesided import OneSidedTransport
from epdctl.transfer.runs import Run, runs
from epdctl.transfer.tensors import require_room
from epdctl.wire.transfer import PoolLocation

__all__ = ["MooncakeMover", "mooncake_transport"]

STAGE_BYTES = 64 << 20


class _Stage:
    """One registered buffer for what is sent from memory that is not; one user at a time."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self.memory = torch.empty(STAGE_BYTES, dtype=torch.uint8, device=device)
        engine.register(self.memory)

    def send(self, session: str, data: torch.Tensor, target: int) -> None:
        for start in range(0, data.numel(), STAGE_BYTES):
            part = data[start : start + STAGE_BYTES]
            with self._lock:
                self.memory[: part.numel()].copy_(part)
                if part.is_cuda:
                    torch.cuda.current_stream(part.device).synchronize()
                self._engine.write(session, [Run(self.memory.data_ptr(), target + start, part.numel())])

    def close(self) -> None:
        self._engine.unregister(self.memory)


class _RemotePool:
    """A Remote."""

    def __init__(self, engine: Engine, stage: _Stage | None, location: PoolLocation) -> None:
        self._engine = engine
        self._stage = stage
        self._location = location

    def put(self, puts: Sequence[Put], stop: threading.Event) -> None:
        place, base = self._location.place, self._location.base
        direct = [put for put in puts if self._stage is None or self._engine.knows(put.data)]
        for batch in _batches(list(runs(direct, base)), self._engine.way.batch_bytes):
            if stop.is_set():
                return
            self._engine.write(place, batch)
        if self._stage is not None:
            for put in puts:
                if not stop.is_set() and not self._engine.knows(put.data):
                    self._stage.send(place, put.data, base + put.place)

    def view(self, place: int, nbytes: int) -> None:
        return None

    def close(self) -> None:
        """The engine keeps its own connections."""


def _batches(runs: Sequence[Run], size: int) -> Iterator[list[Run]]:
    """About ``size`` bytes each; a longer run is not cut."""
    ends = itertools.accumulate(run.nbytes for run in runs)
    for _, group in itertools.groupby(zip(runs, ends, strict=True), lambda pair: (pair[1] - 1) // size):
        yield [run for run, _ in group]


class MooncakeMover(DeviceOrder):
    """A Mover."""

    backend = "mooncake"
    inline_bytes = 0

    def __init__(self, protocol: str, device: torch.device) -> None:
        super().__init__(device)
        self._engine = engine_of(protocol)
        self._memories: list[torch.Tensor] = []
        self.settle_seconds = PROTOCOLS[protocol].settle_seconds
        open_ports = "" if self._engine.private else "; its ports are open to other machines"
        self.note = f"mooncake {protocol}, {probe(self._engine, device):.1f} GB/s to itself{open_ports}"
        self._stage = _Stage(self._engine, device) if PROTOCOLS[protocol].staged else None

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Registered at once: a pool is written to by peers, and read when its pages go to one."""
        require_room(nbytes, device)
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._engine.register(memory)
        self._memories.append(memory)
        return memory

    def locate(self, pool: str, memory: torch.Tensor) -> PoolLocation:
        if not self._engine.knows(memory):
            raise RegistrationFailed(f"the memory of the {pool} pool was not allocated by this transport")
        return PoolLocation(pool=pool, place=self._engine.session, base=memory.data_ptr(), nbytes=memory.numel())

    def reach(self, location: PoolLocation) -> _RemotePool:
        return _RemotePool(self._engine, self._stage, location)

    def close(self) -> None:
        for memory in self._memories:
            self._engine.unregister(memory)
        self._memories.clear()
        if self._stage is not None:
            self._stage.close()


def mooncake_transport(endpoint: str, owner: Owner, protocol: str, device: torch.device) -> OneSidedTransport:
    """Raises UserError where the engine or the protocol is not to be had."""
    if protocol not in PROTOCOLS:
        raise UserError(f"no Mooncake protocol is called {protocol!r}", hint=f"one of {', '.join(PROTOCOLS)}")
    return OneSidedTransport(endpoint, owner, MooncakeMover(protocol, device))
