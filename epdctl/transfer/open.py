"""Which transport a rank uses: one table over the backends of the topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from epdctl.errors import UserError
from epdctl.transfer.base import Transport
from epdctl.transfer.landing import Owner
from epdctl.transfer.memory import Exchange, MemoryTransport
from epdctl.transfer.zmq import ZmqTransport
from epdctl.wire.config import RankSpec, TransferConfig

__all__ = ["BACKENDS", "open_transport"]

_WITHIN_THIS_PROCESS = Exchange()


def _zmq(endpoint: str, owner: Owner) -> Transport:
    return ZmqTransport(endpoint, owner)


def _memory(endpoint: str, owner: Owner) -> Transport:
    return MemoryTransport(endpoint, owner, _WITHIN_THIS_PROCESS)


BACKENDS: Mapping[str, Callable[[str, Owner], Transport]] = {"memory": _memory, "zmq": _zmq}


def open_transport(config: TransferConfig, spec: RankSpec) -> Transport:
    """The transport of this rank, listening at an endpoint of its own. Inside a running loop.

    Raises UserError for a backend that does not exist, OSError when the endpoint cannot be bound.
    """
    backend = BACKENDS.get(config.backend)
    if backend is None:
        raise UserError(f"no transfer backend is called {config.backend!r}", hint=f"one of {', '.join(BACKENDS)}")
    return backend(spec.endpoint("transfer"), Owner(spec.rank, spec.incarnation, spec.token))
