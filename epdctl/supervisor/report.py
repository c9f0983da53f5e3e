"""What ``status`` shows, made from what the daemon holds."""

from __future__ import annotations

from collections.abc import Iterable

import psutil

from epdctl.ids import RunId
from epdctl.supervisor.member import Member
from epdctl.supervisor.states.events import Timer
from epdctl.topology.plan import Plan
from epdctl.wire.control import RankState, RankStatus, StatusReply
from epdctl.wire.lifecycle import Endpoints, Loading

__all__ = ["SCHEMA", "rank_status", "reason", "rss", "status_reply"]

SCHEMA = 1  # of ``status --json``; raised when a field changes its meaning or goes


def status_reply(plan: Plan, run: RunId, members: Iterable[Member], now: float, stopping: bool) -> StatusReply:
    return StatusReply(
        schema=SCHEMA,
        cluster=plan.cluster,
        run=run,
        gateway=plan.gateway_url,
        ranks=[rank_status(member, now) for member in members],
        stopping=stopping,
    )


def rank_status(member: Member, now: float) -> RankStatus:
    life = member.life
    beat = life.beat if life is not None else None
    return RankStatus(
        rank=member.name,
        stage=member.planned.stage,
        state=member.rank.state,
        reason=reason(member),
        since=now - member.since,
        pid=member.pid,
        incarnation=member.rank.incarnation,
        restarts=member.rank.restarts,
        restarts_asked=member.rank.restarts_asked,
        gpus=list(member.planned.gpus),
        rss_bytes=rss(member.pid),
        inflight=beat.inflight if beat is not None else None,
        completed=beat.completed if beat is not None else None,
        endpoints=life.endpoints if life is not None else Endpoints(),
        leases=beat.leases if beat is not None else None,
        held_pages=beat.total_pages - beat.free_pages if beat is not None else None,
        transfer=life.transfer if life is not None else None,
        log_tail=list(member.log_tail) if member.rank.state is RankState.FAILED else [],
        next_try_s=_next_try(member, now),
    )


def reason(member: Member) -> str:
    """The state machine's reason; while the rank loads, how far it is."""
    loading = member.life.loading if member.life is not None else None
    if member.rank.state is RankState.STARTING and loading is not None:
        again = f"; last restart: {member.rank.cause}" if member.rank.cause else ""
        return f"loading {_progress(loading)}{again}"
    return member.rank.reason


def _next_try(member: Member, now: float) -> float | None:
    timer = member.timers.get(Timer.BACKOFF)
    return None if timer is None else max(0.0, timer.when() - now)


def rss(pid: int | None) -> int | None:
    """Resident bytes of the process ``pid``; None when it is gone."""
    if pid is None:
        return None
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _progress(loading: Loading) -> str:
    """How far it is, where there is more than one piece."""
    return f"{loading.phase} {loading.done}/{loading.total}" if loading.total > 1 else loading.phase
