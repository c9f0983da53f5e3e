"""What stops before what. Nobody waits for anybody at a start: model ranks load independently, the router and the
gateway answer 503 until some are ready, and so the slowest load alone decides how long it takes. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from epdctl.ids import RankName, Stage
from epdctl.supervisor.states.rank import SETTLED
from epdctl.wire.control import RankState

__all__ = ["STEPS", "States", "before", "front_of", "next_to_stop"]

States = Mapping[RankName, RankState]

# Front to back. The gateway takes no more requests and finishes those it has, for which it needs all the others; then
# the encoders' router, whose own clients' items can go nowhere once its encoders take none. The rest comes last.
FRONT = (Stage.GATEWAY, Stage.ENCODER_ROUTER)
STEPS = len(FRONT) + 1  # of a stop


def next_to_stop(ranks: Iterable[RankName], states: States) -> list[RankName]:
    """The ranks to stop now: whichever of the unsettled ones stop first."""
    return front_of([rank for rank in ranks if states[rank] not in SETTLED])


def front_of(ranks: Collection[RankName]) -> list[RankName]:
    """Those of them that stop before all the others."""
    first = min(map(_place, ranks), default=0)
    return [rank for rank in ranks if _place(rank) == first]


def before(rank: RankName, other: RankName) -> bool:
    return _place(rank) < _place(other)


def _place(rank: RankName) -> int:
    return FRONT.index(rank.stage) if rank.stage in FRONT else len(FRONT)
