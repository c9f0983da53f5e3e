"""Which rank gets the next request: the one with the least pending; ties go round. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from epdctl.ids import RankName

__all__ = ["Load", "choose"]


@dataclass(frozen=True, slots=True)
class Load:
    rank: RankName
    pending: int


def choose(
    loads: Sequence[Load], *, after: RankName | None = None, avoid: Collection[RankName] = ()
) -> RankName | None:
    """The least loaded rank, or None without any. Of equals, the next one behind ``after``, in a circle.

    ``avoid``: ranks that just failed this request; they are taken only when there is no other.
    """
    if not loads:
        return None
    fresh = [load for load in loads if load.rank not in avoid] or list(loads)
    least = min(load.pending for load in fresh)
    circle = sorted((load.rank for load in fresh if load.pending == least), key=_order)
    later = [rank for rank in circle if after is not None and _order(rank) > _order(after)]
    return (later or circle)[0]


def _order(rank: RankName) -> tuple[str, int, int]:
    return rank.stage, rank.replica, rank.shard or 0
