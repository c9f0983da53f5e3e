"""The process around a service: it speaks the lifecycle with the supervisor and decides how the process ends.

Knows no stage. Whatever ends it, it ends: by message, by signal, by the loss of the supervisor, or by an error that
nobody handled.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, assert_never

from epdctl.errors import BadMessage, EpdError, IncompatiblePeer, UserError, WireError
from epdctl.rank.capture import Capture, clock_of
from epdctl.rank.fatal import Departure, fatal, status_of
from epdctl.rank.figures import Enquiry
from epdctl.rank.loading import Loads, in_thread
from epdctl.rank.service import BecomesIdle, Factual, HearsAbsent, Proof, Provable, Service, TellsOfAll
from epdctl.rank.tasks import Tasks
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import (
    RANK_TO_SUPERVISOR,
    SUPERVISOR_TO_RANK,
    CaptureWritten,
    ClockTold,
    Drain,
    Drained,
    Endpoints,
    Fatal,
    Figures,
    Heartbeat,
    Hello,
    PeersChanged,
    Prove,
    Proved,
    RankToSupervisor,
    Ready,
    StartCapture,
    StopCapture,
    SupervisorToRank,
    TellClock,
    Unfit,
)
from epdctl.wire.message import PROTOCOL
from epdctl.wire.stream import Stream, connect

__all__ = ["RankProcess", "run"]

log = logging.getLogger(__name__)

ServiceFactory = Callable[[RankSpec], Service]
CLOSE_SECONDS = 0.6  # within the grace that the guard gives after SIGTERM
LAST_WORDS_SECONDS = 1.0


async def run(spec: RankSpec) -> Departure:
    """Live as ``spec.rank`` until told to leave."""
    try:
        stream = await connect(spec.supervisor, SUPERVISOR_TO_RANK, RANK_TO_SUPERVISOR)
    except (OSError, WireError) as error:
        log.error("no supervisor at %s: %s", spec.supervisor, error)
        return Departure.ORPHANED
    return await RankProcess(spec, stream).live()


class RankProcess:
    """One incarnation: a service and the stream to its supervisor. The first reason to leave is the one that counts."""

    def __init__(self, spec: RankSpec, stream: Stream[SupervisorToRank, RankToSupervisor]) -> None:
        self._spec = spec
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._thread = threading.current_thread()
        self._leaving: asyncio.Future[Departure | Fatal] = self._loop.create_future()
        self._tasks = Tasks()
        self._service: Service | None = None
        self._ready = False
        self._up = asyncio.Event()  # set when it is ready
        self._capture: Capture | None = None  # once it is ready
        self._peers: PeersChanged | None = None
        self._loading = Loads(self._post)
        self._enquiry = Enquiry(self._post)

    async def live(self) -> Departure:
        self._loop.set_exception_handler(self._unhandled)
        self._loop.add_signal_handler(signal.SIGTERM, self._leave, Departure.ASKED)
        self._post(self._hello())
        self._tasks.start(self._beat(), "heartbeat")
        self._tasks.start(self._listen(), "supervisor")
        self._tasks.start(self._serve(), "service")
        reason = await self._leaving
        status = reason if isinstance(reason, Departure) else await self._last_words(reason)
        await self._wind_down()
        return status

    def _leave(self, reason: Departure | Fatal) -> None:
        if not self._leaving.done():
            self._leaving.set_result(reason)

    def _hello(self) -> Hello:
        spec = self._spec
        return Hello(
            run=spec.run,
            rank=spec.rank,
            incarnation=spec.incarnation,
            protocol=PROTOCOL,
            token=spec.token,
            pid=os.getpid(),
        )

    def _post(self, message: RankToSupervisor) -> None:
        if not self._leaving.done() or isinstance(message, Fatal):
            self._stream.post(message)

    def _unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's exception handler: an error that nobody handled ends the rank."""
        error = context.get("exception")
        if error is None:
            log.warning("the event loop: %s", context.get("message"))
            return
        if isinstance(error, EpdError):  # said in words; where it was raised helps nobody
            log.error("%s", error.message)
            log.debug("raised at", exc_info=error)
        else:
            log.error("%s\n%s", context.get("message"), "".join(traceback.format_exception(error)).rstrip())
        self._leave(fatal(error, serving=self._ready))

    async def _last_words(self, last: Fatal) -> Departure:
        try:
            await self._stream.send(last, seconds=LAST_WORDS_SECONDS)
        except WireError as error:
            log.warning("the supervisor did not hear why: %s", error)
        return status_of(last)

    async def _wind_down(self) -> None:
        """Close what can be closed in time; the operating system takes the rest."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._tasks.close()
                if self._service is not None:
                    await self._service.close()
                await self._stream.close()
        except TimeoutError:
            log.warning("left before everything was closed")
        except Exception:  # the process ends either way, and says what it saw
            log.exception("closing failed")

    async def _serve(self) -> None:
        factory = await in_thread(lambda: self._find_service(self._spec.config.service))
        self._service = factory(self._spec)
        if isinstance(self._service, TellsOfAll):
            self._service.take_source(self._enquiry.ask)
        endpoints = await self._service.start(self._report)
        ready = await _ready(self._service, endpoints)
        self._ready = True
        self._up.set()
        self._capture = Capture(self._service, self._post)
        if self._peers is not None:
            _tell(self._service, self._peers)
        self._post(ready)

    def _find_service(self, name: str) -> ServiceFactory:
        self._report("imports", 0, 1)
        module, _, attribute = name.partition(":")
        try:
            factory: ServiceFactory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"the service {name!r} cannot be imported: {error}") from error
        self._report("imports", 1, 1)
        return factory

    def _report(self, phase: str, done: int, total: int) -> None:
        """A service's Progress; from any thread. On the loop's own it is said in place, so never after Ready."""
        if threading.current_thread() is self._thread:
            self._loaded(phase, done, total)
        else:
            self._loop.call_soon_threadsafe(self._loaded, phase, done, total)

    def _loaded(self, phase: str, done: int, total: int) -> None:
        if not self._ready:
            self._loading.report(phase, done, total, self._loop.time())

    async def _beat(self) -> None:
        """At the plan's pace; sooner once it is ready, and when the work that a beat told of has ended, so that nobody
        reads of requests that are answered. The beat that tells of such an end is followed at the usual pace."""
        early = False
        while True:
            beat = self._heartbeat()
            await self._stream_out(beat)
            news = self._until_news(beat) if not early else asyncio.Event().wait()
            try:
                async with asyncio.timeout(self._spec.config.heartbeat_seconds):
                    await news
                early = beat.inflight > 0
            except TimeoutError:
                early = False

    async def _until_news(self, beat: Heartbeat) -> None:
        """Returns when ``beat`` is no longer what a person would want to read."""
        service: object = self._service
        if not self._ready:
            await self._up.wait()
        elif beat.inflight and isinstance(service, BecomesIdle):
            await service.until_idle()
        else:
            await asyncio.Event().wait()

    def _heartbeat(self) -> Heartbeat:
        if self._service is None or not self._ready:
            return Heartbeat()
        pulse = self._service.pulse()
        return Heartbeat(
            inflight=pulse.inflight,
            completed=pulse.completed,
            free_pages=pulse.free_pages,
            total_pages=pulse.total_pages,
            leases=pulse.leases,
            unhealthy=pulse.unhealthy,
            standstill_s=pulse.standstill,
            waiting=pulse.waiting,
            embeddings=pulse.embeddings,
        )

    async def _stream_out(self, message: RankToSupervisor) -> None:
        """Waits until it is out, so that a supervisor that does not read does not make this process grow."""
        try:
            await self._stream.send(message)
        except WireError as error:  # that it closed is seen by the reader
            log.warning("the supervisor did not take a message: %s", error)

    async def _listen(self) -> None:
        while True:
            try:
                message = await self._stream.receive()
            except BadMessage as error:
                log.warning("dropped a message of the supervisor: %s", error)
                continue
            except WireError as error:
                log.error("lost the supervisor: %s", error)
                message = None
            if message is None:
                self._leave(Departure.ORPHANED)
                return
            self._handle(message)

    def _handle(self, message: SupervisorToRank) -> None:
        match message:
            case PeersChanged():
                self._take_peers(message)
            case Drain(budget_s=budget):
                self._tasks.start(self._drain(budget), "drain")
            case StartCapture():
                self._start_capture(message)
            case StopCapture():
                if self._capture is not None:
                    self._capture.stop()
            case TellClock():
                self._tell_clock(message)
            case Prove(number=number):
                self._tasks.start(self._prove(number), "proof")
            case Figures():
                self._enquiry.told(message)
            case Unfit(text=text):
                self._leave(fatal(IncompatiblePeer(text), serving=False))
            case _:
                assert_never(message)

    def _take_peers(self, peers: PeersChanged) -> None:
        if self._peers is not None and peers.version <= self._peers.version:
            return
        self._peers = peers
        if self._service is not None and self._ready:
            _tell(self._service, peers)

    async def _drain(self, budget: float) -> None:
        try:
            async with asyncio.timeout(budget):
                if self._service is not None and self._ready:
                    await self._service.drain()
        except TimeoutError:
            log.warning("still busy after a drain of %.1f s", budget)
            return
        self._post(Drained())

    def _start_capture(self, order: StartCapture) -> None:
        if self._capture is None:
            self._post(CaptureWritten(capture=order.capture, error=f"{self._spec.rank} is still loading"))
        else:
            self._capture.start(order)

    async def _prove(self, number: int) -> None:
        service: object = self._service
        if self._ready and isinstance(service, Provable):
            proof = await service.prove()
        else:
            proof = Proof("it has no tower that is ready")
        self._post(Proved(number=number, fault=proof.fault, busy=proof.busy))

    def _tell_clock(self, question: TellClock) -> None:
        clock = clock_of(self._service)
        heard = clock()
        self._post(ClockTold(asked=question.asked, heard=heard, told=clock()))


async def _ready(service: Service, endpoints: Endpoints) -> Ready:
    """With what is read of the checkpoint, beside the loop: a remote file system may take seconds for it."""
    if isinstance(service, Factual):
        facts = await in_thread(service.facts)
        return Ready(endpoints=endpoints, facts=facts, transfer=service.transfer_note)
    return Ready(endpoints=endpoints)


def _tell(service: Service, peers: PeersChanged) -> None:
    if isinstance(service, HearsAbsent):
        service.absent_changed(peers.absent)
    service.peers_changed(peers.peers)
