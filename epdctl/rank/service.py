"""What the process of a rank asks of the service inside it. One service per stage implements this."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from epdctl.telemetry.hops import Hops
from epdctl.wire.lifecycle import Absent, Embeddings, Endpoints, Facts, Peer, RankFigures

__all__ = [
    "Ask",
    "BecomesIdle",
    "Factual",
    "HasHops",
    "HearsAbsent",
    "Profilable",
    "Progress",
    "Proof",
    "Provable",
    "Pulse",
    "Recorded",
    "Service",
    "TellsOfAll",
    "Written",
]

Progress = Callable[[str, int, int], None]  # phase, done, total; callable from any thread


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a heartbeat carries; read from the event loop, so it must be cheap."""

    inflight: int = 0
    waiting: int = 0  # of them: for memory, for a batch, for a rank
    completed: int = 0
    free_pages: int = 0
    total_pages: int = 0
    leases: int = 0  # live ones of pools that peers write to, quarantined slots among them
    unhealthy: str | None = None
    standstill: float = 0.0  # seconds that the piece of work under way has run without an end
    embeddings: Embeddings | None = None  # of a rank with a tower


@dataclass(frozen=True, slots=True)
class Recorded:
    """How a profile ended: in a file, unless there is an ``error``, or a ``note`` that there was nothing to write."""

    error: str | None = None
    note: str | None = None


Written = Callable[[Recorded], None]  # callable from any thread


@dataclass(frozen=True, slots=True)
class Proof:
    """``fault``: what was wrong with the canary's values, or that none came. None too where real work took all the time
    there was, and got done: then it is ``busy``."""

    fault: str | None = None
    busy: bool = False


@runtime_checkable
class Provable(Protocol):
    """A Service with a tower."""

    async def prove(self) -> Proof:
        """Encode the canary now, with a deadline of its own; a fault is the pulse's ``unhealthy`` from then on."""
        ...


@runtime_checkable
class HearsAbsent(Protocol):
    """A service that asks why a rank is not there."""

    def absent_changed(self, absent: Sequence[Absent]) -> None:
        """Every planned rank that is not in the table; runs before ``peers_changed`` with that table."""
        ...


class Service(Protocol):
    """Built as ``Service(spec)`` inside a running event loop; every method is called on that loop."""

    async def start(self, progress: Progress) -> Endpoints:
        """Load, bind, and return where peers reach this rank. Long work goes to a thread: heartbeats go on meanwhile.

        Raises LoadError for what a restart cannot mend.
        """
        ...

    def peers_changed(self, peers: Sequence[Peer]) -> None:
        """The whole table of ranks. Links to ranks or incarnations no longer in it are closed at once; one that is not
        accepting finishes what it has."""
        ...

    def pulse(self) -> Pulse: ...

    async def drain(self) -> None:
        """Take nothing new; return when nothing is in flight. Cancelled at the deadline."""
        ...

    async def close(self) -> None:
        """Free pools, sockets and threads. Called once, also after a failed start."""
        ...


@runtime_checkable
class Factual(Protocol):
    """A Service with a model, which must fit those of other ranks. Asked once ``start`` has returned."""

    def facts(self) -> Facts: ...

    @property
    def transfer_note(self) -> str: ...


@runtime_checkable
class Profilable(Protocol):
    """A Service with a model: what torch does in it can be recorded."""

    def start_capture(self, path: str, steps: int | None, written: Written) -> None:
        """Begin a torch profile that is written to ``path`` after ``steps`` or at ``stop_capture``.

        ``written`` is called once, when the file is complete or it is sure that there will be none.
        """
        ...

    def stop_capture(self) -> None: ...


Ask = Callable[[], Awaitable[Sequence[RankFigures]]]  # raises DeadlineExceeded


@runtime_checkable
class TellsOfAll(Protocol):
    """A Service that tells people of every rank of the cluster."""

    def take_source(self, ask: Ask) -> None:
        """``ask`` gives every rank's figures; called once, before ``start``."""
        ...


@runtime_checkable
class BecomesIdle(Protocol):
    """A Service whose end of work is told at once, and not with the next heartbeat."""

    async def until_idle(self) -> None:
        """Returns when nothing is in flight."""
        ...


@runtime_checkable
class HasHops(Protocol):
    """A Service that requests pass through."""

    @property
    def hops(self) -> Hops: ...
