"""The engine on its thread: it steps while there is work, and takes orders between two steps.

The event loop gives orders and hears of results; it never touches the engine. What the engine raises in a step ends
the rank.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import time_ns
from typing import NamedTuple, Protocol

from epdctl.engine.api import Advance, NewSequence
from epdctl.errors import EpdError
from epdctl.rank.compute import ComputeThread

__all__ = ["Period", "Results", "StepEngine", "Stepper"]

AHEAD = 2  # turns on the thread: one under way, and one behind it, so that a busy loop does not hold the engine up


class Period(NamedTuple):
    """Nanoseconds of unix time."""

    began: int
    ended: int


class StepEngine(Protocol):
    """What a rank asks of the engine; ``epdctl.engine.core.Engine`` is one."""

    @property
    def has_work(self) -> bool: ...

    def admit(self, new: NewSequence) -> None: ...

    def abort(self, sequence: str) -> None: ...

    def step(self) -> list[Advance]: ...

    def check(self) -> None: ...


class Results(Protocol):
    """Told on the event loop, in the order in which things happened."""

    def dropped(self, sequence: str) -> None:
        """The engine has forgotten an aborted sequence: it does not touch its memory any more."""
        ...

    def refused(self, sequence: str, error: EpdError) -> None:
        """The engine did not take this sequence."""
        ...

    def advanced(self, advances: Sequence[Advance], during: Period, made: object | None) -> None:
        """``made``: what to wait for before the bytes of this step are read; the next one may run already."""
        ...


@dataclass(frozen=True, slots=True)
class _Abort:
    sequence: str


@dataclass(slots=True)
class _Turn:
    """What one turn on the compute thread did: orders first, then at most one step."""

    dropped: list[str] = field(default_factory=list)
    refused: list[tuple[str, EpdError]] = field(default_factory=list)
    advances: list[Advance] = field(default_factory=list)
    during: Period = Period(0, 0)  # noqa: RUF009
    made: object | None = None
    more: bool = False


class Stepper:
    """What waits here is bounded by the rank's admission: every order is for a sequence that holds a grant."""

    def __init__(
        self, engine: StepEngine, compute: ComputeThread, results: Results, after_step: Callable[[], object | None]
    ) -> None:
        self._engine = engine
        self._compute = compute
        self._results = results
        self._after_step = after_step  # on the compute thread; says what was made, see Results
        self._orders: queue.SimpleQueue[NewSequence | _Abort] = queue.SimpleQueue()
        self._ahead = 0
        self._stopped = threading.Event()

    def admit(self, new: NewSequence) -> None:
        self._orders.put(new)
        self._go_on()

    def abort(self, sequence: str) -> None:
        self._orders.put(_Abort(sequence))
        self._go_on()

    def stop(self) -> None:
        """No step begins after the one under way."""
        self._stopped.set()

    def _go_on(self) -> None:
        while self._ahead < AHEAD and not self._stopped.is_set():
            self._ahead += 1
            self._compute.post(self._turn, self._turned)

    def _turned(self, turn: _Turn) -> None:
        self._ahead -= 1
        if turn.more or not self._orders.empty():
            self._go_on()
        for sequence in turn.dropped:
            self._results.dropped(sequence)
        for sequence, error in turn.refused:
            self._results.refused(sequence, error)
        if turn.advances:
            self._results.advanced(turn.advances, turn.during, turn.made)

    # -- on the compute thread --

    def _turn(self) -> _Turn:
        turn = _Turn()
        if self._stopped.is_set():
            return turn
        self._obey(turn)
        if self._engine.has_work:
            began = time_ns()
            turn.advances = self._engine.step()
            turn.during = Period(began, time_ns())
            turn.made = self._after_step()
        turn.more = self._engine.has_work
        return turn

    def _obey(self, turn: _Turn) -> None:
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            if isinstance(order, _Abort):
                self._engine.abort(order.sequence)
                turn.dropped.append(order.sequence)
            else:
                self._admit(order, turn)

    def _admit(self, new: NewSequence, turn: _Turn) -> None:
        try:
            self._engine.admit(new)
        except EpdError as error:  # the request's own fault; anything else is ours and ends the rank
            turn.refused.append((new.id, error))
