"""What a rank does about a peer that it will write to, before there is anything to write."""

from __future__ import annotations

import logging

from epdctl.errors import OutOfReach, TransferError, UserError, WireError
from epdctl.transfer.base import Transport
from epdctl.wire.lifecycle import Peer

__all__ = ["greet"]

log = logging.getLogger(__name__)


async def greet(transport: Transport, peer: Peer) -> None:
    """Raises UserError where its memory cannot be reached: requests would fail there, and nobody would know why.

    What else goes wrong is left to the first write, which tells its request.
    """
    if peer.endpoints.transfer is None:
        return
    try:
        await transport.greet(peer.endpoints.transfer)
    except OutOfReach as error:
        text = f"{peer.rank} cannot be written to: {error.message}"
        raise UserError(text, hint="write transfer.backend: zmq") from error
    except (TransferError, WireError) as error:
        log.warning("%s was not greeted: %s", peer.rank, error.message)
