"""A cluster's whole life with a real daemon and real children."""

from __future__ import annotations

from epdctl.wire.control import RankState
from tests.lifecycle.conftest import Begin
from tests.support.scripted_rank import Script

ALL = {name: Script() for name in ("gateway/0", "encoder-router/0", "encoder/0", "encoder/1", "prefill/0", "decode/0")}


def test_every_rank_becomes_ready_and_all_of_them_go_down(begin: Begin) -> None:
    cluster = begin(ALL)
    status = cluster.until_ready()
    assert [rank.rank for rank in status.ranks] == list(ALL)
    assert {rank.incarnation for rank in status.ranks} == {1}
    assert all(rank.pid and rank.rss_bytes and rank.endpoints.inbox for rank in status.ranks)
    events = cluster.down()
    assert events[-1].kind == "down"
    assert {event.rank for event in events if event.state is RankState.STOPPED} == set(ALL)
