"""What prefill, decode and language ranks have in common: one engine, one KV pool, one line, and the stays on them.

It knows nothing of embeddings or of a handoff: what a grant leads to, and what a step means, its heirs say.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from epdctl.engine.api import Advance, NewSequence
from epdctl.errors import EpdError, PeerGone
from epdctl.ids import RequestId, Stage
from epdctl.rank.admission import Capacity, Line, Need, Refusal
from epdctl.rank.facts import facts_of
from epdctl.rank.idle import IdleCheck
from epdctl.rank.machine import Machine, Parts
from epdctl.rank.peers import Changes, PeerTable, Place
from epdctl.rank.sequences import HOP_OF, Grant, Phase, Stay, User, stay_name
from epdctl.rank.service import Progress, Pulse, Written
from epdctl.rank.stepper import Period
from epdctl.telemetry.hops import Hops
from epdctl.transfer.pool import Pool
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import FailureKind
from epdctl.wire.lifecycle import Endpoints, Facts, Peer
from epdctl.wire.message import Codec
from epdctl.wire.serve import (
    RANK_TO_GATEWAY,
    Abort,
    Failed,
    Finished,
    FinishReason,
    Likelihood,
    RankToGateway,
    Token,
    Usage,
)
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.trace import Kind
from epdctl.wire.transfer import PoolAddress

__all__ = ["LanguageRank"]

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Stay)
In = TypeVar("In")


class LanguageRank(ABC, Generic[S, In]):
    """Implements rank.service.Service. It lives on one event loop; the engine lives on the compute thread."""

    kind: ClassVar[Kind]  # of what is on its way through it

    def __init__(self, spec: RankSpec, incoming: Codec[In], parts: Parts) -> None:
        self._spec = spec
        self._limits = spec.config.limits
        self._incoming = incoming
        self._parts = parts
        self.hops = Hops()
        self._loop = asyncio.get_running_loop()
        self._table = PeerTable()
        self._place = Place(spec.rank, spec.incarnation)
        self._machine: Machine | None = None
        self._inbox: Inbox[In] | None = None
        self._stays: dict[str, S] = {}
        self._line: Line[str] = Line(spec.config.limits.queue)
        self._written: Sequence[Pool] = ()  # by peers
        self._addresses: dict[str, PoolAddress] = {}
        self._serving: asyncio.Handle | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False
        self._completed = 0
        self._invariants = IdleCheck(self.check)

    # -- what heirs say --

    @abstractmethod
    def _received(self, sender: Sender, message: In, frames: list[memoryview]) -> None:
        """One message to this rank's inbox."""

    @abstractmethod
    def _granted(self, stay: S) -> None:
        """``stay`` holds all it needs."""

    @abstractmethod
    def _advanced(self, stay: S, advance: Advance, made: object | None) -> None:
        """One step took a running ``stay`` further. ``made``: see rank.stepper.Results."""

    @abstractmethod
    def _take(self, stay: S) -> Grant | None:
        """All that ``stay`` needs, or nothing."""

    @abstractmethod
    def _release(self, stay: S, grant: Grant) -> None:
        """Nobody uses any of it any more."""

    @abstractmethod
    def _pools(self) -> Sequence[Pool]:
        """Make the pools that peers write to; once, when the machine stands."""

    @property
    def _quarantined_pages(self) -> int:
        """KV pages that wait for the end of a lost writer."""
        return 0

    @property
    def _capacity(self) -> Capacity:
        return Capacity(self.machine.pages.total, stage=self._spec.config.stage)

    def _leaving(self, stay: S, refusal: Refusal | None) -> None:
        """The story of ``stay`` has ended: tell the peers that still count on it."""

    def _doing(self, stay: S) -> str:
        """What a stay whose time ends was at, for the one who asks why."""
        return "waiting for memory" if stay.phase is Phase.WAITING else f"in phase {stay.phase}"

    def _peers(self, peers: Sequence[Peer], changes: Changes) -> None:
        """Others are routable now."""

    # -- rank.service.Service --

    async def start(self, progress: Progress) -> Endpoints:
        self._machine = await Machine.start(self._spec, self._parts, progress, self)
        pools = self._written = await self._machine.compute.run(self._pools)  # pools are zeroed: seconds
        self._addresses = {pool.name: self._machine.transport.register(pool) for pool in pools}
        for pool in pools:
            pool.freed = self._serve_soon
        self._inbox = Inbox(self._spec.endpoint("inbox"), self._incoming, self._received)
        return Endpoints(inbox=self._inbox.endpoint, transfer=self._machine.transport.endpoint)

    def facts(self) -> Facts:
        loaded = self.machine.loaded
        exchanges = self._spec.config.stage in (Stage.PREFILL, Stage.DECODE)
        return facts_of(self._spec.config, width=loaded.width, layout=loaded.kv.layout if exchanges else None)

    @property
    def transfer_note(self) -> str:
        return self.machine.transport.note

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        changes = self._table.replace(peers)
        for peer in changes.left:
            if peer.endpoints.transfer is not None and self._machine is not None:
                self._machine.transport.withdraw(peer.endpoints.transfer)
        self._peers(peers, changes)
        if self._place.lost(peers):
            self.cut_off()

    def cut_off(self) -> None:
        """This rank had been given up: nothing that was asked of it until now is waited for."""
        for stay in list(self._stays.values()):
            if self._place.over(stay.epoch):
                self._end(stay, self._given_up)

    @property
    def _given_up(self) -> Refusal:
        return Refusal(FailureKind.RANK_LOST, f"{self._spec.rank} was withdrawn for a while")

    def pulse(self) -> Pulse:
        """Raises QuarantineFull and WritesAdrift, which end the rank: only a new process is sure of its memory."""
        if self._machine is None:
            return Pulse()
        for pool in self._written:
            pool.bound_quarantine()
        self._machine.transport.bound_adrift()
        pages = self._machine.pages
        return Pulse(
            inflight=len(self._stays),
            waiting=len(self._line),
            completed=self._completed,
            free_pages=pages.free,
            total_pages=pages.total,
            leases=sum(len(pool.leases) for pool in self._written),
            standstill=self._machine.compute.job_seconds,
            unhealthy=self._invariants.verdict(idle=not self._stays),
        )

    async def until_idle(self) -> None:
        await self._empty.wait()

    async def drain(self) -> None:
        self._draining = True
        await self.until_idle()

    def start_capture(self, path: str, steps: int | None, written: Written) -> None:
        self.machine.profiler.start(path, steps, written)

    def stop_capture(self) -> None:
        self.machine.profiler.stop()

    async def close(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
        for stay in self._stays.values():
            if stay.alarm is not None:
                stay.alarm.cancel()
        if self._inbox is not None:
            self._inbox.close()
        if self._machine is not None:
            await self._machine.close()

    def check(self) -> None:
        """Invariants; raises AssertionError. An idle rank holds nothing."""
        if not self._stays:
            self.hops.check(self.kind)
        self.machine.pages.check()
        held = self._quarantined_pages
        held += sum(len(stay.grant.pages) for stay in self._stays.values() if stay.grant is not None)
        assert held + self.machine.pages.free == self.machine.pages.total, "a KV page belongs to nobody"
        assert all((stay.name in self._line) <= (stay.grant is None) for stay in self._stays.values())

    @property
    def machine(self) -> Machine:
        """Raises RuntimeError before ``start``."""
        if self._machine is None:
            raise RuntimeError(f"{self._spec.rank} has not started")
        return self._machine

    @property
    def inbox(self) -> Inbox[In]:
        if self._inbox is None:
            raise RuntimeError(f"{self._spec.rank} has no inbox yet")
        return self._inbox

    # -- a stay, from door to door --

    def _enter(self, stay: S) -> bool:
        """Note a newcomer; False when it was sent away again."""
        if stay.name in self._stays:
            log.warning("%s came twice; the second is dropped", stay.name)
            return False
        if (refusal := self._closed(stay.epoch)) is not None:
            self._reply(stay.sender, _failed(stay, refusal))
            return False
        self._stays[stay.name] = stay
        self._invariants.busy()
        stay.way = self.hops.begin(self.kind, stay.request, HOP_OF[stay.phase], attempt=stay.attempt)
        self._empty.clear()
        stay.alarm = self._loop.call_at(stay.ends_at, self._late, stay)
        return True

    def _closed(self, epoch: int) -> Refusal | None:
        """Set when nothing of ``epoch`` is taken in."""
        if self._place.refuses(epoch):
            return self._given_up
        return Refusal(FailureKind.RANK_LOST, f"{self._spec.rank} is draining") if self._draining else None

    def _queue(self, stay: S) -> None:
        self._serve()  # so that nobody is sent away from a line that could have moved
        refusal = self._capacity.refusal(stay.need) or self._line.join(stay.name)
        if refusal is not None:
            self._end(stay, refusal)
        self._serve()

    def _run(self, stay: S, new: NewSequence) -> None:
        stay.enter(Phase.RUNNING)
        stay.users.add(User.ENGINE)
        self.machine.stepper.admit(new)

    def _end(self, stay: S, refusal: Refusal | None = None) -> None:
        """The one way out. What it holds is released at once, or when its last user let go."""
        if stay.over:
            return
        stay.enter(Phase.LEAVING)
        self._line.leave(stay.name)
        if stay.alarm is not None:
            stay.alarm.cancel()
        if User.ENGINE in stay.users:
            self.machine.stepper.abort(stay.name)
        if refusal is not None:
            self._reply(stay.sender, _failed(stay, refusal))
        self._leaving(stay, refusal)
        self._settle(stay)

    def _let_go(self, stay: S, user: User) -> None:
        stay.users.discard(user)
        self._settle(stay)

    def _settle(self, stay: S) -> None:
        if stay.phase is not Phase.LEAVING or stay.users:
            return
        stay.enter(Phase.GONE)
        del self._stays[stay.name]
        if stay.grant is not None:
            self._release(stay, stay.grant)
        self._serve_soon()
        if not self._stays:
            self._empty.set()

    def _serve_soon(self) -> None:
        """Later, because memory comes back in the middle of other work, that of ``_serve`` included."""
        if self._serving is None:
            self._serving = self._loop.call_soon(self._serve)

    def _serve(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            self._serving = None
        for name, grant in self._line.serve(lambda name: self._take(self._stays[name])):
            stay = self._stays[name]
            stay.grant = grant
            stay.enter(Phase.GRANTED)
            self._granted(stay)

    def _full(self, need: Need) -> bool:
        """No seat, or too few pages, for one more."""
        seated = sum(stay.grant is not None for stay in self._stays.values())
        return seated >= self._limits.inflight or self.machine.pages.free < need.pages

    def _left(self, stay: S) -> float:
        """Seconds of its time."""
        return max(0.0, stay.ends_at - self._loop.time())

    def _late(self, stay: S) -> None:
        text = f"its time ended on {self._spec.rank} while {self._doing(stay)}"
        self._end(stay, Refusal(FailureKind.DEADLINE, text))

    def _abort(self, message: Abort) -> None:
        if (stay := self._find(message.request, message.attempt)) is not None:
            self._end(stay)

    def _find(self, request: RequestId, attempt: int) -> S | None:
        """The stay of this attempt whose story still goes on."""
        stay = self._stays.get(stay_name(request, attempt))
        return None if stay is None or stay.over else stay

    # -- results of the engine (rank.stepper.Results) --

    def advanced(self, advances: Sequence[Advance], during: Period, made: object | None) -> None:
        for advance in advances:
            self._completed += 1
            if (stay := self._stays.get(advance.id)) is not None:
                if stay.way is not None and self.hops.recording:
                    stay.way.within(_work_of(stay, advance), *during, text=f"{advance.computed} tokens are computed")
                self._step(stay, advance, made)

    def _step(self, stay: S, advance: Advance, made: object | None) -> None:
        if advance.finished is not None or advance.failed is not None:
            stay.users.discard(User.ENGINE)
        if stay.over:
            self._settle(stay)
        elif advance.failed is not None:
            self._end(stay, Refusal(FailureKind.INTERNAL, advance.failed))
        else:
            self._advanced(stay, advance, made)

    def refused(self, sequence: str, error: EpdError) -> None:
        if (stay := self._stays.get(sequence)) is not None:
            self._let_go(stay, User.ENGINE)
            self._end(stay, Refusal(FailureKind.INTERNAL, error.message))

    def dropped(self, sequence: str) -> None:
        if (stay := self._stays.get(sequence)) is not None:
            self._let_go(stay, User.ENGINE)

    # -- to the gateway --

    def _answer(self, stay: S, token: int, finished: FinishReason | None, likelihood: Likelihood | None = None) -> None:
        """Send a sampled token on, and the end of the answer. An end token is counted, not sent."""
        stay.sampled += 1
        if finished is not FinishReason.STOP:
            said = Token(
                request=stay.request,
                attempt=stay.attempt,
                index=stay.sampled - 1,
                token=token,
                likelihood=likelihood,
            )
            self._tell(stay, said)
        if finished is not None:
            usage = Usage(prompt_tokens=stay.prompt_tokens, completion_tokens=stay.sampled)
            self._tell(stay, Finished(request=stay.request, attempt=stay.attempt, reason=finished, usage=usage))
            self._end(stay)

    @property
    def _gateway_expected(self) -> bool:
        """One is there by the table. One that somebody stops is taken out of it before it goes."""
        return any(peer.accepting for peer in self._table.of(Stage.GATEWAY))

    def _tell(self, stay: S, message: RankToGateway) -> None:
        if not stay.over:
            self._reply(stay.sender, message)

    def _reply(self, sender: Sender, message: RankToGateway) -> None:
        try:
            self.inbox.reply(sender, message, RANK_TO_GATEWAY)
        except PeerGone as error:
            level = logging.WARNING if self._gateway_expected else logging.INFO
            log.log(level, "a gateway is gone, with all it asked for: %s", error)
            for stay in [stay for stay in self._stays.values() if stay.sender == sender]:
                self._end(stay)


def _work_of(stay: Stay, advance: Advance) -> str:
    """A step over the prompt, or one over the answer."""
    return "chunk" if advance.computed <= stay.prompt_tokens else "step"


def _failed(stay: Stay, refusal: Refusal) -> Failed:
    return Failed(request=stay.request, attempt=stay.attempt, kind=refusal.kind, text=refusal.text)
