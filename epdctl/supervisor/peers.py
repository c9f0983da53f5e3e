"""The table of routable ranks that every rank is told, whole, at each change."""

from __future__ import annotations

from epdctl.ids import RankName
from epdctl.supervisor.member import Member
from epdctl.wire.lifecycle import Endpoints, Peer, PeersChanged

__all__ = ["PeerTable"]


class PeerTable:
    def __init__(self) -> None:
        self.version = 0
        self._peers: dict[RankName, Peer] = {}

    def advertise(self, member: Member) -> None:
        endpoints = member.life.endpoints if member.life is not None else Endpoints()
        self._peers[member.name] = Peer(
            rank=member.name,
            stage=member.planned.stage,
            incarnation=member.rank.incarnation,
            endpoints=endpoints,
        )
        self.version += 1

    def withdraw(self, rank: RankName) -> None:
        if self._peers.pop(rank, None) is not None:
            self.version += 1

    def message(self) -> PeersChanged:
        return PeersChanged(version=self.version, peers=list(self._peers.values()))
