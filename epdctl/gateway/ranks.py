"""The routable ranks that a request can go through, how much each has pending from here, and the links to them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec

from epdctl.gateway.balance import Load, choose
from epdctl.ids import TOWER_STAGES, RankName, Stage
from epdctl.rank.peers import Links, PeerTable
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ROUTER_TO_CLIENT,
    CancelEncode,
    ClientToRouter,
    Encoded,
    EncodeFailed,
    RouterToClient,
    Sized,
)
from epdctl.wire.lifecycle import Absent, Endpoints, Peer
from epdctl.wire.serve import (
    RANK_TO_GATEWAY,
    TO_DECODE,
    TO_LANGUAGE,
    TO_PREFILL,
    Abort,
    RankRef,
    RankToGateway,
    ToDecode,
    ToLanguage,
    ToPrefill,
)

__all__ = ["Ranks", "Reply", "Route"]

DEATHS_KNOWN = 1024  # the latest; no request lives long enough to ask for older ones

Reply = RankToGateway | Encoded | EncodeFailed


@dataclass(frozen=True, slots=True)
class Route:
    """The ranks of one attempt. ``entry`` takes the prompt and grants slots, ``exit`` streams the tokens: a prefill
    and a decode rank, or the same language or mono rank twice. ``router``: of a mono rank, its own."""

    entry: Peer
    exit: Peer
    router: Peer | None  # None for a prompt without media

    @property
    def split(self) -> bool:
        return self.entry != self.exit

    @property
    def peers(self) -> tuple[Peer, ...]:
        models = (self.entry, self.exit) if self.split else (self.exit,)
        return models if self.router is None else (*models, self.router)


class Ranks:
    """``received(peer, message)`` runs for each reply; ``lost(peer)`` once for each rank that is withdrawn.

    ``planned``: the model stages of the cluster; empty when that is not known.
    """

    def __init__(
        self,
        received: Callable[[Peer, Reply], None],
        lost: Callable[[Peer], None],
        planned: Collection[Stage] = (),
    ) -> None:
        def from_rank(peer: Peer, message: RankToGateway, _: list[memoryview]) -> None:
            received(peer, message)

        def from_router(peer: Peer, message: RouterToClient, _: list[memoryview]) -> None:
            if not isinstance(message, Sized):  # it knew the size before
                received(peer, message)

        self.prefill: Links[RankToGateway, ToPrefill] = Links(
            RANK_TO_GATEWAY, TO_PREFILL, from_rank, stages=frozenset({Stage.PREFILL}), lost=lost
        )
        self.decode: Links[RankToGateway, ToDecode] = Links(
            RANK_TO_GATEWAY, TO_DECODE, from_rank, stages=frozenset({Stage.DECODE}), lost=lost
        )
        self.language: Links[RankToGateway, ToLanguage] = Links(
            RANK_TO_GATEWAY, TO_LANGUAGE, from_rank, stages=frozenset({Stage.LANGUAGE, Stage.MONO}), lost=lost
        )
        self.router: Links[RouterToClient, ClientToRouter] = Links(
            ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, from_router, stages=frozenset({Stage.ENCODER_ROUTER}), lost=lost
        )
        self._encoders = PeerTable(frozenset({Stage.ENCODER}))
        self._absent: Sequence[Absent] = ()
        self._deaths: deque[RankRef] = deque(maxlen=DEATHS_KNOWN)
        self._planned = frozenset(planned)
        self._pending: Counter[Peer] = Counter()
        self._last: dict[Stage, RankName] = {}

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        self._encoders.replace(peers)
        for links in (self.prefill, self.decode, self.language):
            links.peers_changed(peers)
        self.router.peers_changed([*peers, *(_own_router(peer) for peer in peers if peer.stage is Stage.MONO)])

    def absent_changed(self, absent: Sequence[Absent]) -> None:
        self._absent = tuple(absent)
        ended = [RankRef(rank=each.rank, incarnation=each.incarnation) for each in absent if each.died]
        self._deaths.extend(each for each in ended if each not in self._deaths)

    def died(self, who: RankRef) -> bool:
        """This incarnation came to its end by a fault, and not because somebody wanted it to."""
        return who in self._deaths

    def close(self) -> None:
        for links in (self.prefill, self.decode, self.language, self.router):
            links.close()

    def routable(self, peer: Peer) -> bool:
        return any(peer in links.table for links in (self.prefill, self.decode, self.language, self.router))

    # -- choosing --

    @property
    def sees(self) -> bool:
        """Whether the cluster was made to take media."""
        return not self._planned or not self._planned.isdisjoint(TOWER_STAGES)

    def missing(self, *, media: bool) -> list[str]:
        """What stands between a request and an answer; empty when a path exists."""
        if self._exits(media=media):
            return []
        missing = [f"no {stage} rank is ready" for stage in self._model_stages if not self._ready(stage)]
        if media and Stage.MONO not in self._planned:
            if not self._routers:
                missing.append("no encoder-router is ready")
            if not self._encoders.accepting:
                missing.append("no encoder rank is ready")
        return missing

    def hopeless(self, *, media: bool) -> list[str]:
        """Why no path will exist as long as nobody does something about it; empty while there is hope."""
        ways = [self._dead_ends(way) for way in self._ways(media)]
        return [end for ends in ways for end in ends] if all(ways) else []

    def _ways(self, media: bool) -> list[tuple[Stage, ...]]:
        """The stages that make an answer together, each way that the plan has."""
        encoding = (Stage.ENCODER_ROUTER, Stage.ENCODER) if media else ()
        whole = {Stage.MONO: (Stage.MONO,), Stage.LANGUAGE: (Stage.LANGUAGE, *encoding)}
        ways = [way for stage, way in whole.items() if stage in self._planned]
        return ways or [(Stage.PREFILL, Stage.DECODE, *encoding)]

    def _dead_ends(self, way: Sequence[Stage]) -> list[str]:
        """Stages all of whose ranks are gone for good, and why."""
        found = []
        for stage in way:
            absent = [each for each in self._absent if each.stage is stage]
            if absent and all(each.hopeless for each in absent) and not self._present(stage):
                found.append("; ".join(f"{each.rank} is {each.hopeless}" for each in absent))
        return found

    def _present(self, stage: Stage) -> bool:
        tables = (self.prefill.table, self.decode.table, self.language.table, self.router.table, self._encoders)
        return any(peer.rank.stage is stage for table in tables for peer in table)

    def route(self, *, media: bool, avoid: Collection[RankName] = ()) -> Route | None:
        """The least loaded ranks, or None while a stage has none. ``avoid``: taken only when there is no other."""
        exits = self._exits(media=media)
        if not exits:
            return None
        leaving = self._choose(exits, Stage.DECODE, avoid)
        if leaving.stage is Stage.MONO:
            return Route(leaving, leaving, _own_router(leaving) if media else None)
        router = self._choose(self._routers, Stage.ENCODER_ROUTER, avoid) if media else None
        if leaving.stage is Stage.LANGUAGE:
            return Route(leaving, leaving, router)
        return Route(self._choose(self.prefill.table.accepting, Stage.PREFILL, avoid), leaving, router)

    def _exits(self, *, media: bool) -> list[Peer]:
        """Every rank that could stream the answer, as things stand. A mono rank needs nobody else."""
        halves = self.decode.table.accepting if self.prefill.table.accepting else ()
        encoded = not media or (self._routers and self._encoders.accepting)
        return [peer for peer in (*halves, *self.language.table.accepting) if encoded or peer.stage is Stage.MONO]

    @property
    def _routers(self) -> list[Peer]:
        """Those that serve any rank."""
        return [peer for peer in self.router.table.accepting if peer.rank.stage is Stage.ENCODER_ROUTER]

    @property
    def _model_stages(self) -> tuple[Stage, ...]:
        """Those whose ranks a prompt passes through, as planned."""
        whole = tuple(stage for stage in (Stage.LANGUAGE, Stage.MONO) if stage in self._planned)
        return whole or (Stage.PREFILL, Stage.DECODE)

    def _ready(self, stage: Stage) -> bool:
        tables = (self.prefill.table, self.decode.table, self.language.table)
        return any(peer.stage is stage for table in tables for peer in table.accepting)

    def _choose(self, peers: Sequence[Peer], circle: Stage, avoid: Collection[RankName]) -> Peer:
        """The least loaded; ``circle``: whose last choice the next tie goes on from."""
        loads = [Load(peer.rank, self._pending[peer]) for peer in peers]
        chosen = choose(loads, after=self._last.get(circle), avoid=avoid)
        assert chosen is not None, "nobody to choose from"
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
        elif peer.stage in (Stage.LANGUAGE, Stage.MONO):
            self.language.send(peer, message)
        else:
            self.router.send(peer, CancelEncode(request=message.request, attempt=message.attempt))


def _own_router(mono: Peer) -> Peer:
    """A mono rank's second inbox, as the encoder router that it is for its own requests."""
    endpoints = Endpoints(inbox=mono.endpoints.encode)
    return msgspec.structs.replace(mono, stage=Stage.ENCODER_ROUTER, endpoints=endpoints)
