"""A rank that cannot reach the memory it is to write to ends, with what to write in its file."""

from __future__ import annotations

from typing import Any

import pytest

from epdctl.errors import OutOfReach, UserError
from epdctl.ids import Incarnation, RankName, Stage
from epdctl.rank.fatal import fatal
from epdctl.rank.greeting import greet
from epdctl.wire.lifecycle import Endpoints, FatalKind, Peer
from tests.support.ranks import run


class Known:
    """A transport that greets; ``error``: instead."""

    def __init__(self, error: Exception | None = None) -> None:
        self.greeted: list[str] = []
        self.error = error

    async def greet(self, endpoint: str) -> None:
        self.greeted.append(endpoint)
        if self.error is not None:
            raise self.error


def peer(transfer: str | None) -> Peer:
    return Peer(
        rank=RankName("decode/0"),
        stage=Stage.DECODE,
        incarnation=Incarnation(1),
        endpoints=Endpoints(transfer=transfer),
    )


@pytest.mark.parametrize(("transfer", "greeted"), [("ipc:///there", ["ipc:///there"]), (None, [])])
def test_whoever_has_a_transport_is_greeted(transfer: str | None, greeted: list[str]) -> None:
    transport: Any = Known()
    run(greet(transport, peer(transfer)))
    assert transport.greeted == greeted


def test_memory_out_of_reach_is_the_plans_fault_and_no_restart_helps() -> None:
    transport: Any = Known(OutOfReach("the memory behind ipc:///there: no peer access"))
    with pytest.raises(UserError, match=r"decode/0 cannot be written to: .* no peer access") as caught:
        run(greet(transport, peer("ipc:///there")))
    last = fatal(caught.value, serving=True)
    assert (last.kind, last.restartable) == (FatalKind.CONFIG, False)
    assert "write transfer.backend: zmq" in last.text
