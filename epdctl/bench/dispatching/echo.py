"""An encoder rank without an encoder: it says that an item is encoded as soon as it has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from epdctl.rank.service import Progress, Pulse
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import (
    ROUTER_TO_WORKER,
    WORKER_TO_ROUTER,
    CancelItem,
    EncodeItem,
    ItemEncoded,
    Prove,
    RouterToWorker,
    StartProfile,
    StopProfile,
)
from epdctl.wire.lifecycle import Endpoints, Peer
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.transfer import TensorSpec

__all__ = ["Echo"]

_SPEC = TensorSpec(dtype="float32", shape=[1, 1], nbytes=4)


class Echo:
    """Implements Service."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec

    async def start(self, progress: Progress) -> Endpoints:
        self._inbox: Inbox[RouterToWorker] = Inbox(self._spec.endpoint("inbox"), ROUTER_TO_WORKER, self._arrived)
        return Endpoints(inbox=self._inbox.endpoint)

    def _arrived(self, router: Sender, message: RouterToWorker, _: list[memoryview]) -> None:
        match message:
            case EncodeItem(dispatch=dispatch):
                self._inbox.reply(router, ItemEncoded(dispatch=dispatch, spec=_SPEC), WORKER_TO_ROUTER)
            case CancelItem():
                pass  # it is done already
            case StartProfile() | StopProfile() | Prove():
                pass  # nobody asks for one here
            case _:
                assert_never(message)

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        """It speaks when it is spoken to."""

    def pulse(self) -> Pulse:
        return Pulse()

    async def drain(self) -> None:
        """Nothing is ever in flight."""

    async def close(self) -> None:
        self._inbox.close()
