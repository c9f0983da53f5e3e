"""May this rank exchange data with those that serve? Compared at Ready, before anybody is told of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from epdctl.ids import RankName
from epdctl.wire.lifecycle import Facts

__all__ = ["misfit"]


def misfit(rank: RankName, facts: Facts, others: Iterable[tuple[RankName, Facts]]) -> str | None:
    """Why ``rank`` must not serve beside ``others``, with both sides' values; None when it may."""
    for other, theirs in others:
        if differences := list(_differences(rank, facts, other, theirs)):
            return f"{rank} and {other} must not exchange data: {'; '.join(differences)}"
    return None


def _differences(rank: RankName, mine: Facts, other: RankName, theirs: Facts) -> Iterator[str]:
    """What only one of them has is no difference."""
    for name in Facts.__struct_fields__:
        here, there = getattr(mine, name), getattr(theirs, name)
        if here is not None and there is not None and here != there:
            yield f"{name} is {here} on {rank} and {there} on {other}"
