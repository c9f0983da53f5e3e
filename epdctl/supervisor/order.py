"""What stops before what. Nobody waits for anybody at a start: model ranks load independently, the router and the
gateway answer 503 until some are ready, and so the slowest load alone decides how long it takes. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from epdctl.ids import RankName, Stage
from epdctl.supervisor.states.rank import SETTLED
from epdctl.wire.control import RankState

__all__ = ["STOPS_FIRST", "States", "next_to_stop"]

States = Mapping[RankName, RankState]

# The gateway takes no more requests and finishes those it has, for which it needs all the others.
STOPS_FIRST = frozenset({Stage.GATEWAY})


def next_to_stop(ranks: Iterable[RankName], states: States) -> list[RankName]:
    """The ranks to stop now: those that stop first while any of them is unsettled, then all the others."""
    left = [rank for rank in ranks if states[rank] not in SETTLED]
    return [rank for rank in left if rank.stage in STOPS_FIRST] or left
