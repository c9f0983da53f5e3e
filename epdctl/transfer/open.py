"""Which transport a rank uses: one table over the backends of the topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from epdctl.errors import UserError
from epdctl.transfer.base import Transport
from epdctl.transfer.cuda_ipc import cuda_ipc_transport
from epdctl.transfer.landing import Owner
from epdctl.transfer.memory import Exchange, MemoryTransport
from epdctl.transfer.shm import shm_transport
from epdctl.transfer.zmq import ZmqTransport
from epdctl.wire.config import RankSpec, TransferConfig

__all__ = ["BACKENDS", "Opening", "open_transport"]

_WITHIN_THIS_PROCESS = Exchange()


@dataclass(frozen=True, slots=True)
class Opening:
    """What every backend is given. ``device``: where this rank's data is."""

    endpoint: str
    owner: Owner
    config: TransferConfig
    device: torch.device


def _zmq(opening: Opening) -> Transport:
    return ZmqTransport(opening.endpoint, opening.owner)


def _memory(opening: Opening) -> Transport:
    return MemoryTransport(opening.endpoint, opening.owner, _WITHIN_THIS_PROCESS)


def _shm(opening: Opening) -> Transport:
    return shm_transport(opening.endpoint, opening.owner)


def _mooncake(opening: Opening) -> Transport:
    from epdctl.transfer.mooncake import mooncake_transport  # an extra: only those who chose it need it

    return mooncake_transport(opening.endpoint, opening.owner, opening.config.protocol, opening.device)


def _cuda_ipc(opening: Opening) -> Transport:
    return cuda_ipc_transport(opening.endpoint, opening.owner, opening.device)


BACKENDS: Mapping[str, Callable[[Opening], Transport]] = {
    "cuda-ipc": _cuda_ipc,
    "memory": _memory,
    "mooncake": _mooncake,
    "shm": _shm,
    "zmq": _zmq,
}


def open_transport(config: TransferConfig, spec: RankSpec) -> Transport:
    """The transport of this rank, listening at an endpoint of its own. Inside a running loop.

    Raises UserError for a backend that does not exist or does not work here, OSError when the endpoint cannot be bound.
    """
    backend = BACKENDS.get(config.backend)
    if backend is None:
        raise UserError(f"no transfer backend is called {config.backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    owner = Owner(spec.rank, spec.incarnation, spec.token, config.checksum)
    devices = spec.config.devices
    device = torch.device("cuda", devices[0]) if devices else torch.device("cpu")
    return backend(Opening(spec.endpoint("transfer"), owner, config, device))
