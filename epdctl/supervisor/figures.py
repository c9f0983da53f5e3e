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
    life = member.life
    pid = None if life is None or life.handle is None or life.exit is not None else life.handle.pid
    return RankFigures(
        rank=member.name,
        stage=member.planned.stage,
        ready=member.rank.state is RankState.READY,
        restarts=member.rank.restarts,
        rss_bytes=None if pid is None else rss(pid),
        beat=None if life is None else life.beat,
    )
