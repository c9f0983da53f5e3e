"""The mono rank: tower and language model in one process, with one KV pool, and embeddings that never leave it.

It is made of a language rank, an encoder rank and an encoder router of its own, on one event loop, so that every rule
of theirs holds as it stands. Gateways reach it at two inboxes; no other rank does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from epdctl.decode.language import LanguageService
from epdctl.encoder.router import RouterService
from epdctl.encoder.worker import EncoderService
from epdctl.ids import Stage
from epdctl.rank.machine import NATIVE, Machine, Parts
from epdctl.rank.peers import Place
from epdctl.rank.service import Progress, Proof, Pulse, Written
from epdctl.telemetry.hops import Hops
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import Endpoints, Peer

__all__ = ["MonoService"]


def _native_encoder(spec: RankSpec, beside: Machine) -> EncoderService:
    return EncoderService(spec, beside=beside)


class MonoService:
    """A Service. Tower and engine take turns on one compute thread: they have one device, and the plan gave the rank
    its CPU threads once. It also makes a capture one recording of both."""

    def __init__(
        self,
        spec: RankSpec,
        parts: Parts = NATIVE,
        encoder: Callable[[RankSpec, Machine], EncoderService] = _native_encoder,
    ) -> None:
        self._spec = spec
        self._place = Place(spec.rank, spec.incarnation)
        self._make_encoder = encoder
        self._language = LanguageService(spec, parts)
        self._router = RouterService(spec, purpose="encode")
        self._router.hops = self.hops
        self._encoder: EncoderService | None = None

    async def start(self, progress: Progress) -> Endpoints:
        """One model after the other: loading changes what is global to the process."""

        def tower(phase: str, done: int, total: int) -> None:
            progress(f"tower {phase}", done, total)

        language = await self._language.start(progress)
        self._encoder = self._make_encoder(self._spec.within("tower"), self._language.machine)
        self._encoder.hops = self.hops
        encoder = await self._encoder.start(tower)
        router = await self._router.start(progress)
        self._router.peers_changed([self._only_encoder(encoder)])
        return Endpoints(inbox=language.inbox, encode=router.inbox)

    def _only_encoder(self, endpoints: Endpoints) -> Peer:
        spec = self._spec
        return Peer(rank=spec.rank, stage=Stage.ENCODER, incarnation=spec.incarnation, endpoints=endpoints)

    @property
    def hops(self) -> Hops:
        """One book for all three parts."""
        return self._language.hops

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        """No link leads out of this process: gateways come to it, and leave it."""
        self._language.peers_changed([peer for peer in peers if peer.rank == self._spec.rank])
        if self._place.lost(peers):
            self._router.cut_off()

    def pulse(self) -> Pulse:
        """A request and each of its pictures are a piece of work each, as on ranks of their own."""
        language, router = self._language.pulse(), self._router.pulse()
        tower = Pulse() if self._encoder is None else self._encoder.pulse()
        return replace(
            language,
            inflight=language.inflight + router.inflight,
            waiting=language.waiting + router.waiting,
            completed=language.completed + router.completed,
            unhealthy=tower.unhealthy or router.unhealthy or language.unhealthy,
            embeddings=tower.embeddings,
        )

    async def prove(self) -> Proof:
        assert self._encoder is not None, "used before start"
        return await self._encoder.prove()

    async def until_idle(self) -> None:
        await self._language.until_idle()
        await self._router.until_idle()

    async def drain(self) -> None:
        """The language half first: what it holds may still wait for pictures."""
        await self._language.drain()
        await self._router.drain()

    def start_capture(self, path: str, steps: int | None, written: Written) -> None:
        """``steps`` counts steps of the engine and batches of the tower alike."""
        self._language.start_capture(path, steps, written)

    def stop_capture(self) -> None:
        self._language.stop_capture()

    async def close(self) -> None:
        """In the direction of the work; the language half owns the compute thread."""
        await self._router.close()
        if self._encoder is not None:
            await self._encoder.close()
        await self._language.close()
