"""What the daemon knows of each rank in numbers: its state, and what its last heartbeat said."""

from __future__ import annotations

from collections.abc import Iterable

from epdctl.supervisor.member import Member
from epdctl.supervisor.report import rss
from epdctl.wire.control import RankState
from epdctl.wire.lifecycle import Figures, RankFigures

__all__ = ["figures_of"]


def figures_of(members: Iterable[Member]) -> Figures:
    return Figures(ranks=[_of(member) for member in members])


def _of(member: Member) -> RankFigures:
    return RankFigures(
        rank=member.name,
        stage=member.planned.stage,
        ready=member.rank.state is RankState.READY,
        restarts=member.rank.restarts,
        restarts_asked=member.rank.restarts_asked,
        rss_bytes=rss(member.pid),
        beat=None if member.life is None else member.life.beat,
    )
