"""Front to back: who is stopped before whom."""

from __future__ import annotations

import random

from epdctl.ids import RankName
from epdctl.supervisor.order import before, front_of, next_to_stop
from epdctl.wire.control import RankState

GATEWAY, ROUTER, *REST = map(
    RankName, ("gateway/0", "encoder-router/0", "encoder/0", "encoder/1", "prefill/0", "decode/0")
)


def test_the_gateway_stops_then_the_router_then_all_the_others() -> None:
    ranks = [GATEWAY, ROUTER, *REST]
    random.Random(3).shuffle(ranks)
    states = dict.fromkeys(ranks, RankState.READY)
    for due in ([GATEWAY], [ROUTER], REST, []):
        for state in (RankState.READY, RankState.DRAINING, RankState.STOPPING):
            states |= dict.fromkeys(due, state)
            assert set(next_to_stop(ranks, states)) == set(due), "as long as they are not settled"
        states |= dict.fromkeys(due, RankState.STOPPED)


def test_whoever_is_not_there_is_not_waited_for() -> None:
    assert front_of(REST) == REST
    assert front_of([*REST, ROUTER]) == [ROUTER]
    assert front_of([]) == []
    assert before(GATEWAY, ROUTER)
    assert before(ROUTER, REST[0])
    assert not before(REST[0], REST[1])
