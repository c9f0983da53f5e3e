"""The one Mooncake engine of a process: started with the protocol that the plan says, and proved to use it.

It binds to every address whatever it is told, and asks nobody for a password; so its listening sockets are tied to the
loopback device as soon as they are there, before any memory is registered.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from epdctl.errors import RegistrationFailed, TransferError, UserError
from epdctl.transfer.loopback import keep_on_loopback, listening, port_of
from epdctl.transfer.rdma import rdma_devices
from epdctl.transfer.runs import Run
from epdctl.wire.variables import MOONCAKE, steered

__all__ = ["PROTOCOLS", "Engine", "Way", "engine_of", "probe"]

log = logging.getLogger(__name__)

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Way:
    """How one protocol is asked for, and what it must reach at start. ``settle_seconds``: see Guests.

    ``batch_bytes``: between two looks at whether the writer was told to stop. ``staged``: it reads registered memory
    only, so what lies elsewhere goes through a buffer that is.
    """

    engine: str
    probe_bytes: int
    least_gb_per_s: float
    settle_seconds: float
    batch_bytes: int
    staged: bool = False


PROTOCOLS = {
    "tcp": Way("tcp", 4 << 20, 0.0, 5.0, 64 << 20),
    "rdma": Way("rdma", 16 << 20, 0.0, 5.0, 256 << 20, staged=True),
    "nvlink": Way("tcp", 256 << 20, 50.0, 1.0, 1 << 30),  # TCP in its place would reach 2 to 6
}


class RawEngine(Protocol):
    """What is used of ``mooncake.engine.TransferEngine``."""

    def initialize(self, host: str, metadata: str, protocol: str, device: str, /) -> int: ...
    def get_rpc_port(self) -> int: ...
    def register_memory(self, address: int, nbytes: int, /) -> int: ...
    def unregister_memory(self, address: int, /) -> int: ...
    def batch_transfer_sync_write(self, to: str, own: list[int], theirs: list[int], sizes: list[int], /) -> int: ...


class Engine:
    """The one engine of this process. Every call but ``write`` is quick; ``write`` blocks and releases the GIL.

    ``private``: no other machine reaches its ports.
    """

    def __init__(self, raw: RawEngine, protocol: str, *, private: bool = True) -> None:
        self.protocol = protocol
        self.private = private
        self.way = PROTOCOLS[protocol]
        self._raw = raw
        self._known: dict[int, int] = {}  # address → bytes
        self.port = raw.get_rpc_port()  # where others ask which memory is registered
        self.session = f"{HOST}:{self.port}"

    def register(self, memory: torch.Tensor) -> None:
        """Raises RegistrationFailed."""
        address, nbytes = memory.data_ptr(), memory.numel()
        if self._raw.register_memory(address, nbytes) != 0:
            raise RegistrationFailed(f"Mooncake ({self.protocol}) does not take {nbytes} bytes on {memory.device}")
        self._known[address] = nbytes

    def unregister(self, memory: torch.Tensor) -> None:
        if self._known.pop(memory.data_ptr(), None) is not None:
            self._raw.unregister_memory(memory.data_ptr())

    def knows(self, memory: torch.Tensor) -> bool:
        """It lies within what was registered."""
        address, nbytes = memory.data_ptr(), memory.numel()
        return any(start <= address and address + nbytes <= start + size for start, size in self._known.items())

    def write(self, session: str, runs: Sequence[Run]) -> None:
        """Raises TransferError."""
        sources, targets, sizes = map(list, zip(*runs, strict=True))
        if self._raw.batch_transfer_sync_write(session, sources, targets, sizes) != 0:
            raise TransferError(f"Mooncake ({self.protocol}) did not deliver {sum(sizes)} bytes to {session}")


@functools.cache
def engine_of(protocol: str) -> Engine:
    """Started once; a second protocol in one process is refused. Raises UserError with what is missing."""
    if engine_of.cache_info().currsize:
        raise UserError("one process has one Mooncake engine, and it runs with another protocol already")
    _require_environment(protocol)
    if protocol == "rdma" and (trouble := rdma_devices().trouble):
        raise UserError(f"protocol rdma: {trouble}", hint="write transfer.protocol: tcp")
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise UserError(f"Mooncake cannot be imported: {error}", hint="`epdctl doctor` says what to install") from error
    before = listening()
    raw = TransferEngine()
    if raw.initialize(HOST, "P2PHANDSHAKE", PROTOCOLS[protocol].engine, "") != 0:
        raise UserError(f"Mooncake does not start with protocol {protocol}", hint="its own lines above say why")
    opened = listening() - before
    engine = Engine(raw, protocol, private=_kept_private(opened))
    _require_protocol(engine, opened)
    return engine


def _require_environment(protocol: str) -> None:
    """The engine must have been told ``protocol`` and no other. Raises UserError."""
    if (told := steered(os.environ)) != [protocol]:
        found = ", ".join(f"{MOONCAKE[other]} ({other})" for other in told) or "none of its like"
        raise UserError(f"protocol {protocol} needs {MOONCAKE[protocol]}=1 in the environment, which has {found}")


def _require_protocol(engine: Engine, opened: frozenset[int]) -> None:
    """Over TCP it listens for data beside the port where engines introduce themselves, and else it does not.

    Raises UserError where it took another protocol than it was told. What NVLink fell to, its rate shows: ``probe``.
    """
    takes_tcp = any(port_of(fd) != engine.port for fd in opened)
    if engine.protocol == "rdma" and takes_tcp:
        raise UserError(
            "Mooncake was told to use RDMA and took TCP",
            hint="`epdctl doctor` says what it makes of the devices; or write transfer.protocol: tcp",
        )
    if engine.protocol == "tcp" and not takes_tcp:
        raise UserError("Mooncake was told to use TCP and took another protocol", hint="install a newer one")


def _kept_private(sockets: frozenset[int]) -> bool:
    """Not to be able to is no reason not to start, but it is said: here, and in ``status`` as long as the rank runs."""
    try:
        keep_on_loopback(sockets)
    except OSError as error:
        log.warning("Mooncake's ports ask for no token and can be reached from other machines: %s", error)
        return False
    return True


def probe(engine: Engine, device: torch.device) -> float:
    """GB/s of a write to ourselves. Raises UserError when it does not arrive, or too slowly for what was asked for."""
    way = engine.way
    source = torch.full((way.probe_bytes,), 165, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    engine.register(source)
    engine.register(target)
    try:
        run = Run(source.data_ptr(), target.data_ptr(), source.numel())
        rate = source.numel() / min(_timed(engine, run) for _ in range(3)) / 1e9
        arrived = bool(torch.equal(source, target))
    finally:
        engine.unregister(source)
        engine.unregister(target)
    if not arrived:
        raise UserError(f"Mooncake ({engine.protocol}) said that its first bytes were delivered, and they were not")
    if rate < way.least_gb_per_s:
        raise UserError(
            f"Mooncake moves {rate:.1f} GB/s where {engine.protocol} gives more than {way.least_gb_per_s:.0f}: "
            "it fell to another protocol",
            hint="install the Mooncake package for this CUDA (`epdctl doctor`), or write transfer.protocol: tcp",
        )
    return rate


def _timed(engine: Engine, run: Run) -> float:
    began = time.perf_counter()
    engine.write(engine.session, [run])
    return time.perf_counter() - began
