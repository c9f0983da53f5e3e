"""What starts after what, and what stops before what. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from epdctl.ids import RankName, Stage
from epdctl.supervisor.states import ROUTABLE, SETTLED
from epdctl.topology.plan import Plan
from epdctl.wire.control import RankState

__all__ = ["STARTS_AFTER", "STOPS_FIRST", "dependencies_met", "next_to_stop"]

States = Mapping[RankName, RankState]

# Nobody waits for anybody: model ranks load independently, the router and the gateway answer 503 until some are ready,
# and so the slowest load alone decides how long a start takes.
STARTS_AFTER: Mapping[Stage, frozenset[Stage]] = {}

# The gateway takes no more requests and finishes those it has, for which it needs all the others.
STOPS_FIRST = frozenset({Stage.GATEWAY})


def dependencies_met(
    plan: Plan, states: States, rank: RankName, after: Mapping[Stage, frozenset[Stage]] = STARTS_AFTER
) -> bool:
    """Every rank of every stage that ``rank`` starts after is routable."""
    needed = after.get(rank.stage, frozenset())
    return all(states[other.rank] in ROUTABLE for other in plan.ranks if other.stage in needed)


def next_to_stop(ranks: Iterable[RankName], states: States) -> list[RankName]:
    """The ranks to stop now: those that stop first while any of them is unsettled, then all the others."""
    left = [rank for rank in ranks if states[rank] not in SETTLED]
    return [rank for rank in left if rank.stage in STOPS_FIRST] or left
