"""Who is routable, and one open link to each of them that is spoken to. Imports no torch: gateway and router use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from epdctl.errors import PeerGone
from epdctl.ids import Incarnation, RankName, Stage
from epdctl.wire.lifecycle import Peer
from epdctl.wire.message import Codec
from epdctl.wire.sockets import Buffer, Link

__all__ = ["Changes", "Links", "PeerTable", "Place"]

In = TypeVar("In")
Out = TypeVar("Out")
PeerKey = tuple[RankName, Incarnation]


def _key(peer: Peer) -> PeerKey:
    return peer.rank, peer.incarnation


def _ignore(*_: object) -> None:
    """Nobody needs to know."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What one new table did: a rank that came back as another incarnation is in both."""

    joined: tuple[Peer, ...] = ()
    left: tuple[Peer, ...] = ()


class PeerTable:
    """The routable ranks of ``stages`` (None: of every stage). Pure."""

    def __init__(self, stages: frozenset[Stage] | None = None) -> None:
        self._stages = stages
        self._peers: dict[PeerKey, Peer] = {}

    def __iter__(self) -> Iterator[Peer]:
        """In the order of the table that the supervisor sent."""
        return iter(tuple(self._peers.values()))

    def __len__(self) -> int:
        return len(self._peers)

    def __contains__(self, peer: Peer) -> bool:
        return self._peers.get(_key(peer)) == peer

    def replace(self, peers: Sequence[Peer]) -> Changes:
        """Take the whole new table. One whose endpoints changed has left and joined."""
        before = self._peers
        self._peers = {_key(peer): peer for peer in peers if self._stages is None or peer.stage in self._stages}
        return Changes(
            joined=tuple(peer for key, peer in self._peers.items() if before.get(key) != peer),
            left=tuple(peer for key, peer in before.items() if self._peers.get(key) != peer),
        )

    def of(self, stage: Stage) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.stage is stage]

    @property
    def accepting(self) -> list[Peer]:
        """Those that new work may be given to."""
        return [peer for peer in self._peers.values() if peer.accepting]

    def find(self, rank: RankName, incarnation: Incarnation | None = None) -> Peer | None:
        """The peer of this name; with ``incarnation``, that one or nobody."""
        for peer in self._peers.values():
            if peer.rank == rank and incarnation in (None, peer.incarnation):
                return peer
        return None


class Place:
    """A rank's own place in the table. Who loses it has been given up by all its peers, whether it noticed or not: they
    closed their links, so that nobody is going to call off what they had asked for. That may even come later than the
    news of the loss, out of a socket that had not been read.
    """

    def __init__(self, rank: RankName, incarnation: Incarnation) -> None:
        self._who = rank, incarnation
        self._held: Peer | None = None
        self._lost = -1  # the latest epoch that is over

    def over(self, epoch: int) -> bool:
        """What was asked in ``epoch`` has been given up by whoever asked."""
        return epoch <= self._lost

    def refuses(self, epoch: int) -> bool:
        """The same of what comes in only now. 0: nobody knows when it was asked."""
        return epoch > 0 and self.over(epoch)

    def lost(self, peers: Sequence[Peer]) -> bool:
        """Take the new table. True when the place of the last one is gone, or is another one by now."""
        before, self._held = self._held, next((peer for peer in peers if _key(peer) == self._who), None)
        if before is None or before == self._held:
            return False
        self._lost = before.epoch
        return True


class Links(Generic[In, Out]):
    """One link per routable (rank, incarnation), opened at the first send and closed when the peer is withdrawn.

    ``received(peer, message, frames)`` runs for each answer. ``lost(peer)`` runs once for each peer that vanishes,
    whether it was spoken to or not, when ``table`` holds the new state already.
    """

    def __init__(
        self,
        incoming: Codec[In],
        outgoing: Codec[Out],
        received: Callable[[Peer, In, list[memoryview]], None],
        *,
        stages: frozenset[Stage] | None = None,
        lost: Callable[[Peer], None] = _ignore,
    ) -> None:
        self.table = PeerTable(stages)
        self._incoming = incoming
        self._outgoing = outgoing
        self._received = received
        self._lost = lost
        self._standing: Callable[[Peer, bool], None] = _ignore
        self._links: dict[PeerKey, Link[In, Out]] = {}
        self._bad_frames = 0  # of links that are closed

    @property
    def bad_frames(self) -> int:
        """Of all links there ever were."""
        return self._bad_frames + sum(link.bad_frames for link in self._links.values())

    def watch(self, standing: Callable[[Peer, bool], None]) -> None:
        """``standing(peer, stands)`` runs when the connection to one that is in the table broke, which may have cost
        what was under way on it, and when it stands, for the first time or again."""
        self._standing = standing

    def peers_changed(self, peers: Sequence[Peer]) -> Changes:
        changes = self.table.replace(peers)
        for peer in changes.left:
            if (link := self._links.pop(_key(peer), None)) is not None:
                self._bad_frames += link.bad_frames
                link.close()
        for peer in changes.left:
            self._lost(peer)
        return changes

    def send(self, peer: Peer, message: Out, frames: Sequence[Buffer] = ()) -> None:
        """Raises PeerGone when ``peer`` is not routable, has no inbox, or does not read."""
        link = self._links.get(_key(peer))
        if link is None:
            link = self._links[_key(peer)] = self._open(peer)
        link.send(message, frames)

    def _open(self, peer: Peer) -> Link[In, Out]:
        if peer not in self.table:
            raise PeerGone(f"{peer.rank} (incarnation {peer.incarnation}) was withdrawn")
        if peer.endpoints.inbox is None:
            raise PeerGone(f"{peer.rank} has no inbox")

        def received(message: In, frames: list[memoryview]) -> None:
            self._received(peer, message, frames)

        def standing(stands: bool) -> None:
            self._standing(peer, stands)

        link = Link(peer.endpoints.inbox, self._incoming, self._outgoing, received)
        link.watch(standing)
        return link

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        self.table.replace(())
