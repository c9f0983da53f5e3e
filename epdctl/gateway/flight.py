"""One request under way: its attempts, one after another, until it has an end. Driven by messages, never waiting.

What one attempt received is the beginning of the next: noise is a function of (seed, position), so a resumed answer
goes on as it would have. Messages of an older attempt, or of a rank outside this one, change nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from epdctl.errors import PeerGone, RequestError
from epdctl.gateway.brief import Brief
from epdctl.gateway.intake import Order
from epdctl.gateway.ranks import Ranks, Reply, Route
from epdctl.gateway.states import ENDED, RequestState, Step, advance
from epdctl.ids import RankName, new_room
from epdctl.rank.web import encode_failure, failure
from epdctl.telemetry.hops import Way
from epdctl.telemetry.metrics import GatewayMeters
from epdctl.wire.encode import Encoded, EncodeFailed, FailureKind
from epdctl.wire.lifecycle import Peer
from epdctl.wire.serve import (
    Abort,
    Failed,
    Finished,
    FinishReason,
    Granted,
    Likelihood,
    RankRef,
    Token,
    Usage,
)

__all__ = ["Director", "Ending", "Flight"]

log = logging.getLogger(__name__)


# A rank that dies takes many requests with it, and at most one of them is to blame: once is bad luck.
MOST_DEATHS = 2


def _ref(peer: Peer) -> RankRef:
    return RankRef(rank=peer.rank, incarnation=peer.incarnation)


@dataclass(frozen=True, slots=True)
class Ending:
    """A whole answer. ``usage`` is over all attempts."""

    reason: FinishReason
    usage: Usage


@dataclass(slots=True)
class Attempt:
    """One try, and how far it is. ``seats``: ranks it still needs; ``granted``: they have memory for it."""

    brief: Brief
    seats: list[Peer]
    unencoded: set[int]
    granted: bool = False

    @property
    def number(self) -> int:
        return self.brief.attempt

    @property
    def route(self) -> Route:
        return self.brief.route

    @property
    def base(self) -> int:
        """Tokens of the answer that were known before."""
        return len(self.brief.known)


@dataclass(frozen=True, slots=True)
class Losses:
    """How often an attempt was lost, and what is known of the last time."""

    count: int = 0
    text: str = ""
    avoid: frozenset[RankName] = frozenset()  # the ranks of that attempt: taken again only when there is no other


class Director(Protocol):
    """What a flight asks of whoever directs all of them."""

    @property
    def ranks(self) -> Ranks: ...

    @property
    def meters(self) -> GatewayMeters: ...

    def now(self) -> float:
        """Seconds on the clock that deadlines are given in."""
        ...

    def wait(self, flight: Flight) -> None:
        """``flight`` needs a route, now or as soon as there is one."""
        ...

    def landed(self, flight: Flight) -> None:
        """Nothing more will come of ``flight``."""
        ...


class Flight:
    """Made in RECEIVED. Its owner reads ``tokens()`` to the end, or calls ``stop`` or ``abandon``."""

    def __init__(self, way: Way, order: Order, deadline: float, director: Director) -> None:
        self.request = way.request
        self.order = order
        self.deadline = deadline
        self.state = RequestState.RECEIVED
        self.losses = Losses()
        self.resumes = 0  # attempts that went on from tokens which were there already
        self.ending: Ending | None = None
        self._director = director
        self._way = way
        way.enter(self.state.value)
        self.likelihoods: list[Likelihood | None] = []  # of each token so far, over all attempts
        self._suspects: set[RankRef] = set()  # ranks that were lost with this request; they may have died of it
        self._deaths: list[RankRef] = []  # those that did die
        self._received: list[int] = []
        self._attempts = 0
        self._attempt: Attempt | None = None
        self._error: RequestError | None = None
        self._news = asyncio.Event()

    # -- for the owner --

    async def tokens(self) -> AsyncGenerator[list[int], None]:
        """All tokens that are there, again and again, until the end. Raises RequestError for a failed request."""
        seen = 0
        while True:
            fresh = self._received[seen:]
            if fresh:
                seen += len(fresh)
                yield fresh
            elif self.state in ENDED:
                break
            else:
                self._news.clear()
                await self._news.wait()  # ends at the deadline at the latest: expire() is news
        if self._error is not None:
            raise self._error

    @property
    def has_media(self) -> bool:
        return bool(self.order.media)

    def stop(self) -> None:
        """The owner has all it wants: a stop string was found."""
        self._end(Step.FINISH)

    def abandon(self) -> None:
        """The client hung up."""
        self._end(Step.ABORT)

    def fail(self, error: RequestError) -> None:
        if self.state not in ENDED:
            self._error = error
            self._end(Step.FAIL)

    def expire(self) -> None:
        """The deadline has come."""
        if self.state in ENDED:
            return
        if self.state is RequestState.RECEIVED:
            missing = ", ".join(self._director.ranks.missing(media=self.has_media))
            why = "; ".join(filter(None, (missing, self.losses.text))) or "no rank took it"
            self.fail(failure(FailureKind.NO_RANK, f"no rank answered within the request's time: {why}"))
        else:
            self.fail(failure(FailureKind.DEADLINE, f"no answer within the request's time; it was {self._doing()}"))

    def _doing(self) -> str:
        """What its state is called, or what it waits for there: memory is granted before anything is computed."""
        attempt = self._attempt
        if attempt is None or attempt.granted or self.state not in (RequestState.ENCODING, RequestState.PREFILLING):
            return self.state
        route = attempt.route
        return f"waiting for memory of {' and '.join(dict.fromkeys((route.exit.rank, route.entry.rank)))}"

    def strand(self, why: str) -> None:
        """There is no route, and it has waited long enough for one."""
        self.fail(failure(FailureKind.NO_RANK, "; ".join(filter(None, (why, self.losses.text)))))

    # -- for whoever directs --

    def judge(self) -> None:
        """More is known about ranks that are gone: a request that they keep dying with is not tried for ever."""
        died = {each for each in self._suspects if self._director.ranks.died(each)}
        self._suspects -= died
        self._deaths += sorted(died, key=lambda each: (each.rank, each.incarnation))
        if len(self._deaths) < MOST_DEATHS or self.state in ENDED:
            return
        names = ", ".join(f"{each.rank} (incarnation {each.incarnation})" for each in self._deaths)
        text = f"{len(self._deaths)} ranks died while they worked on this request: {names}"
        log.error("%s is given up: %s", self.request, text)
        self._director.meters.given_up.inc()
        self.fail(RequestError(502, f"{text}; it may be tried again, but it may be what kills them", code="rank_lost"))

    def place(self, route: Route) -> None:
        """Begin an attempt over ``route``."""
        self._step(Step.PLACED_MEDIA if self.has_media else Step.PLACED_TEXT)
        self._attempts += 1
        brief = Brief(self.request, self._attempts, new_room(), route, self.order, tuple(self._received))
        self._attempt = attempt = Attempt(brief, list(route.peers), set(range(len(self.order.media))))
        self._director.meters.attempts.inc()
        if attempt.base:
            self.resumes += 1
            self._director.meters.resumed.inc()
        for peer in attempt.seats:
            self._director.ranks.take(peer)
        self._or_lose(lambda: self._ask(attempt))

    def withdrawn(self, peer: Peer) -> None:
        """``peer`` is gone. What it had done already stays done."""
        if self._attempt is not None and peer in self._attempt.seats:
            self._lose(f"{peer.rank} was lost", peer.stage.value, {_ref(peer)})

    def receive(self, peer: Peer, message: Reply) -> bool:
        """False when the message came too late to matter."""
        attempt = self._attempt
        if attempt is None or message.attempt != attempt.number or peer not in attempt.route.peers:
            return False
        match message:
            case Token():
                self._on_token(attempt, message)
            case Granted():
                self._on_granted(attempt, message)
            case Encoded():
                self._on_encoded(attempt, message.index)
            case Finished():
                self._on_finished(attempt, message)
            case Failed() | EncodeFailed() if peer not in attempt.seats:
                return False  # it had done its part
            case Failed() | EncodeFailed():
                self._on_failed(attempt, peer, message)
        return True

    # -- one attempt --

    def _ask(self, attempt: Attempt) -> None:
        ranks, brief, budget = self._director.ranks, attempt.brief, self._budget()
        if attempt.route.split:
            ranks.decode.send(attempt.route.exit, brief.decode(budget))  # decode's memory first: see wire.serve
            ranks.prefill.send(attempt.route.entry, brief.prefill(budget))
        else:
            ranks.language.send(attempt.route.entry, brief.generate(budget))

    def _budget(self) -> float:
        return max(0.0, self.deadline - self._director.now())

    def _on_granted(self, attempt: Attempt, message: Granted) -> None:
        if attempt.granted:
            return
        attempt.granted = True
        if attempt.route.router is None:
            return
        if len(message.slots) != len(self.order.media):
            self.fail(failure(FailureKind.INTERNAL, f"{len(message.slots)} slots for {len(self.order.media)} media"))
            return
        self._or_lose(lambda: self._encode(attempt, message))

    def _encode(self, attempt: Attempt, granted: Granted) -> None:
        assert attempt.route.router is not None
        for index, slot in enumerate(granted.slots):
            encode = attempt.brief.encode(index, slot, granted.notify, self._budget())
            self._director.ranks.router.send(attempt.route.router, encode, [self.order.media[index].data])

    def _on_encoded(self, attempt: Attempt, index: int) -> None:
        attempt.unencoded.discard(index)
        if not attempt.unencoded and self.state is RequestState.ENCODING:
            self._step(Step.EMBEDDED)
            self._leave(attempt, attempt.route.router)

    def _on_token(self, attempt: Attempt, message: Token) -> None:
        expected = len(self._received) - attempt.base
        if message.index < expected:
            return
        if message.index > expected:
            self._lose(f"token {expected} of {attempt.route.exit.rank} never came", attempt.route.exit.stage.value)
            return
        self._received.append(message.token)
        self.likelihoods.append(message.likelihood)
        self._news.set()
        first = expected == 0 and attempt.route.split
        self._step(Step.HANDED if first else Step.TOKEN)
        if expected == 0:  # the prompt is computed: only the exit is needed from here on
            for peer in attempt.route.peers:
                if peer != attempt.route.exit:
                    self._leave(attempt, peer)

    def _on_finished(self, attempt: Attempt, message: Finished) -> None:
        self.ending = Ending(
            message.reason, self._usage(attempt.base + message.usage.completion_tokens, message.usage.cached_tokens)
        )
        self._end(Step.FINISH, abort=False)

    def _on_failed(self, attempt: Attempt, peer: Peer, message: Failed | EncodeFailed) -> None:
        if message.kind is FailureKind.RANK_LOST:
            gone = next((seat for seat in attempt.route.peers if not self._director.ranks.routable(seat)), None)
            text, stage = f"{peer.rank}: {message.text}", gone.stage.value if gone else "reported"
            self._lose(text, stage, self._suspected(peer, message))
            return
        log.info("%s failed on %s: %s: %s", self.request, peer.rank, message.kind, message.text)
        if isinstance(message, EncodeFailed):
            self.fail(encode_failure(message, self.order.places[message.index]))
        else:
            self.fail(failure(message.kind, message.text))

    def _suspected(self, teller: Peer, message: Failed | EncodeFailed) -> set[RankRef]:
        """Whoever tells of a loss is not the one who was lost."""
        seats = set() if self._attempt is None else {_ref(seat) for seat in self._attempt.seats}
        encoders = set(message.lost) if isinstance(message, EncodeFailed) else set()
        return (seats - {_ref(teller)}) | encoders

    # -- ends of attempts --

    def _or_lose(self, send: Callable[[], None]) -> None:
        try:
            send()
        except PeerGone as error:
            self._lose(error.message, "unreachable")

    def _lose(self, text: str, stage: str, suspects: Collection[RankRef] = ()) -> None:
        """Back to RECEIVED with what is known, or to the end when nothing is missing but the last word."""
        attempt = self._attempt
        assert attempt is not None
        log.info("%s: attempt %d lost while %s: %s", self.request, attempt.number, self.state, text)
        self._director.meters.lost.labels(stage).inc()
        self.losses = Losses(self.losses.count + 1, text, frozenset(peer.rank for peer in attempt.route.peers))
        if len(self._received) >= self.order.sampling.max_tokens:
            self.ending = Ending(FinishReason.LENGTH, self._usage(len(self._received)))  # only that word was missing
            self._end(Step.FINISH)
            return
        self._drop_attempt(abort=True)
        self._step(Step.LOST)
        self._suspects.update(suspects)
        self.judge()
        if self.state not in ENDED:
            self._director.wait(self)

    def _end(self, step: Step, *, abort: bool = True) -> None:
        if self.state in ENDED:
            return
        self._drop_attempt(abort=abort)
        self._step(step)
        self._news.set()
        self._director.landed(self)

    def _drop_attempt(self, *, abort: bool) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        for peer in list(attempt.seats):
            self._leave(attempt, peer)
        if abort:
            for peer in attempt.route.peers:
                with contextlib.suppress(PeerGone):  # what is gone holds nothing
                    self._director.ranks.abort(peer, Abort(request=self.request, attempt=attempt.number))

    def _leave(self, attempt: Attempt, peer: Peer | None) -> None:
        if peer in attempt.seats:
            attempt.seats.remove(peer)
            self._director.ranks.leave(peer)

    def _step(self, step: Step) -> None:
        before, self.state = self.state, advance(self.state, step)
        if self.state in ENDED:
            self._way.enter("closing", self.state.value)  # what is left to send
        elif self.state is not before:
            self._way.enter(self.state.value)
        if self.state is RequestState.RECEIVED:
            self._way.attempt = self._attempts + 1

    def _usage(self, completion: int, cached: int = 0) -> Usage:
        return Usage(prompt_tokens=len(self.order.prompt.tokens), completion_tokens=completion, cached_tokens=cached)
