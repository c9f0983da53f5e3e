"""The table that every rank is told, whole, at each change: the ranks to have links to, and why others are absent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from epdctl.ids import RankName
from epdctl.supervisor.member import Member
from epdctl.supervisor.states.rank import LINKED, ROUTABLE, SETTLED
from epdctl.wire.lifecycle import Absent, Endpoints, Peer, PeersChanged

__all__ = ["PeerTable"]


class PeerTable:
    def __init__(self) -> None:
        self.version = 0
        self._peers: dict[RankName, Peer] = {}
        self._absent: list[Absent] = []
        self._epochs: Counter[RankName] = Counter()

    def advertise(self, member: Member) -> None:
        """A newcomer, or one of which something is new."""
        known, accepting = self._peers.get(member.name), member.rank.state in ROUTABLE
        if known is None:
            self._epochs[member.name] += 1
            known = _peer(member, self._epochs[member.name])
        self._peers[member.name] = msgspec.structs.replace(known, accepting=accepting)
        self.version += 1

    def withdraw(self, rank: RankName) -> None:
        if self._peers.pop(rank, None) is not None:
            self.version += 1

    def note(self, members: Iterable[Member]) -> None:
        """What is known of those that are not in the table."""
        absent = [_absent(member) for member in members if member.rank.state not in LINKED]
        if absent != self._absent:
            self._absent = absent
            self.version += 1

    def message(self) -> PeersChanged:
        return PeersChanged(version=self.version, peers=list(self._peers.values()), absent=self._absent)


def _peer(member: Member, epoch: int) -> Peer:
    return Peer(
        rank=member.name,
        stage=member.planned.stage,
        incarnation=member.rank.incarnation,
        endpoints=member.life.endpoints if member.life is not None else Endpoints(),
        epoch=epoch,
    )


def _absent(member: Member) -> Absent:
    rank = member.rank
    reason = f"{rank.state}: {rank.reason}"
    return Absent(
        rank=member.name,
        stage=member.planned.stage,
        incarnation=rank.incarnation,
        died=rank.died,
        hopeless=reason if rank.state in SETTLED else None,
        reason=reason,
    )
