"""What a rank does about a peer that it will write to, before there is anything to write."""

from __future__ import annotations

import logging

from epdctl.errors import OutOfReach, UserError
from epdctl.transfer.base import Transport
from epdctl.wire.lifecycle import Peer

__all__ = ["greet"]

log = logging.getLogger(__name__)


async def greet(transport: Transport, peer: Peer) -> None:
    """Raises UserError where its memory cannot be reached: requests would fail there, and nobody would know why."""
    if peer.endpoints.transfer is None:
        return
    try:
        await transport.greet(peer.endpoints.transfer)
    except OutOfReach as error:
        raise UserError(
            f"{peer.rank} cannot be written to: {error.message}", hint="write transfer.backend: zmq"
        ) from error
    log.info("%s can be written to", peer.rank)
