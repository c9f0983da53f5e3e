"""The routable ranks that a request can go through, how much each has pending from here, and the links to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from epdctl.gateway.balance import Load, choose
from epdctl.ids import RankName, Stage
from epdctl.rank.peers import Links, PeerTable
from epdctl.wire.encode import CLIENT_TO_ROUTER, ROUTER_TO_CLIENT, CancelEncode, ClientToRouter, RouterToClient
from epdctl.wire.lifecycle import Peer
from epdctl.wire.serve import (
    RANK_TO_GATEWAY,
    TO_DECODE,
    TO_LANGUAGE,
    TO_PREFILL,
    Abort,
    RankToGateway,
    ToDecode,
    ToLanguage,
    ToPrefill,
)

__all__ = ["Ranks", "Reply", "Route"]

Reply = RankToGateway | RouterToClient


@dataclass(frozen=True, slots=True)
class Route:
    """The ranks of one attempt. ``entry`` takes the prompt and grants slots, ``exit`` streams the tokens: a prefill
    and a decode rank, or the same language rank twice."""

    entry: Peer
    exit: Peer
    router: Peer | None  # None for a prompt without pictures

    @property
    def split(self) -> bool:
        return self.entry != self.exit

    @property
    def peers(self) -> tuple[Peer, ...]:
        models = (self.entry, self.exit) if self.split else (self.exit,)
        return models if self.router is None else (*models, self.router)


class Ranks:
    """``received(peer, message)`` runs for each reply; ``lost(peer)`` once for each rank that is withdrawn."""

    def __init__(self, received: Callable[[Peer, Reply], None], lost: Callable[[Peer], None]) -> None:
        def from_rank(peer: Peer, message: RankToGateway, _: list[memoryview]) -> None:
            received(peer, message)

        def from_router(peer: Peer, message: RouterToClient, _: list[memoryview]) -> None:
            received(peer, message)

        self.prefill: Links[RankToGateway, ToPrefill] = Links(
            RANK_TO_GATEWAY, TO_PREFILL, from_rank, stages=frozenset({Stage.PREFILL}), lost=lost
        )
        self.decode: Links[RankToGateway, ToDecode] = Links(
            RANK_TO_GATEWAY, TO_DECODE, from_rank, stages=frozenset({Stage.DECODE}), lost=lost
        )
        self.language: Links[RankToGateway, ToLanguage] = Links(
            RANK_TO_GATEWAY, TO_LANGUAGE, from_rank, stages=frozenset({Stage.LANGUAGE}), lost=lost
        )
        self.router: Links[RouterToClient, ClientToRouter] = Links(
            ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, from_router, stages=frozenset({Stage.ENCODER_ROUTER}), lost=lost
        )
        self._encoders = PeerTable(frozenset({Stage.ENCODER}))
        self._pending: Counter[Peer] = Counter()
        self._last: dict[Stage, RankName] = {}

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._encoders.replace(peers)
        for links in (self.prefill, self.decode, self.language, self.router):
            links.peers_changed(peers)

    def close(self) -> None:
        for links in (self.prefill, self.decode, self.language, self.router):
            links.close()

    def routable(self, peer: Peer) -> bool:
        return any(peer in links.table for links in (self.prefill, self.decode, self.language, self.router))

    # -- choosing --

    def missing(self, *, pictures: bool) -> list[str]:
        """What stands between a request and an answer; empty when a path exists."""
        missing = []
        if not self._pairs and not len(self.language.table):
            missing += [f"no {stage} rank is ready" for stage, table in self._halves if not len(table)]
        if pictures and not len(self.router.table):
            missing.append("no encoder-router is ready")
        if pictures and not len(self._encoders):
            missing.append("no encoder rank is ready")
        return missing

    def route(self, *, pictures: bool, avoid: Collection[RankName] = ()) -> Route | None:
        """The least loaded ranks, or None while a stage has none. ``avoid``: taken only when there is no other."""
        if self.missing(pictures=pictures):
            return None
        router = self._pick(self.router.table, Stage.ENCODER_ROUTER, avoid) if pictures else None
        exits = [table for table in (self._exits_of_pairs, self.language.table) if table is not None and len(table)]
        leaving = self._least(exits, avoid)
        if leaving.stage is Stage.LANGUAGE:
            return Route(leaving, leaving, router)
        return Route(self._pick(self.prefill.table, Stage.PREFILL, avoid), leaving, router)

    @property
    def _halves(self) -> tuple[tuple[Stage, PeerTable], ...]:
        return (Stage.PREFILL, self.prefill.table), (Stage.DECODE, self.decode.table)

    @property
    def _pairs(self) -> bool:
        return all(len(table) for _, table in self._halves)

    @property
    def _exits_of_pairs(self) -> PeerTable | None:
        return self.decode.table if self._pairs else None

    def _least(self, tables: Sequence[PeerTable], avoid: Collection[RankName]) -> Peer:
        """Of decode and language ranks together; both lead to an answer."""
        peers = [peer for table in tables for peer in table]
        return self._choose(peers, self._last.get(Stage.DECODE), Stage.DECODE, avoid)

    def _pick(self, table: PeerTable, stage: Stage, avoid: Collection[RankName]) -> Peer:
        return self._choose(list(table), self._last.get(stage), stage, avoid)

    def _choose(
        self, peers: Sequence[Peer], after: RankName | None, circle: Stage, avoid: Collection[RankName]
    ) -> Peer:
        loads = [Load(peer.rank, self._pending[peer]) for peer in peers]
        chosen = choose(loads, after=after, avoid=avoid)
        assert chosen is not None, "a table that route() had seen filled is empty"
        self._last[circle] = chosen
        return next(peer for peer in peers if peer.rank == chosen)

    # -- pending work --

    def take(self, peer: Peer) -> None:
        self._pending[peer] += 1

    def leave(self, peer: Peer) -> None:
        self._pending[peer] -= 1
        if not self._pending[peer]:
            del self._pending[peer]

    def check(self) -> None:
        """Called when nothing should be in flight."""
        assert not self._pending, f"pending work nobody waits for: {self._pending}"

    # -- giving up --

    def abort(self, peer: Peer, message: Abort) -> None:
        """Raises PeerGone."""
        if peer.stage is Stage.PREFILL:
            self.prefill.send(peer, message)
        elif peer.stage is Stage.DECODE:
            self.decode.send(peer, message)
        elif peer.stage is Stage.LANGUAGE:
            self.language.send(peer, message)
        else:
            self.router.send(peer, CancelEncode(request=message.request, attempt=message.attempt))
