"""The one tree of errors. Each leaf carries the exit status of the CLI and, where there is one, a hint.

EpdError (70: our fault)
├── UserError (2)
│   ├── TopologyError      many mistakes in one file, each with its place
│   ├── PlacementError     the topology is fine, this machine cannot hold it
│   ├── SelectorError      no such rank, stage or cluster
│   └── AlreadyRunning     a cluster of this name is up
├── NotRunning (3)         nothing to talk to
├── Unreachable (4)        something is there and does not answer
├── RankError (1)
│   ├── RankFailed         a rank ended in FAILED: reason and tail of its log
│   ├── LoadError          a checkpoint this rank cannot load; never worth a restart
│   └── IncompatiblePeer   two processes that must not talk: protocol, model, versions
├── WireError (70)
│   ├── BadMessage         a frame that is not what the schema says
│   ├── PeerGone           the other end closed or was withdrawn
│   └── DeadlineExceeded (5)
├── TransferError (70)
│   ├── PoolExhausted      no slot; the caller waits or answers 429
│   ├── LeaseExpired       the right to a slot ended
│   ├── RegistrationFailed a transport refused a pool's memory
│   ├── SlotBusy           another writer has not left the slot
│   ├── QuarantineFull     too many slots wait for writers of which nobody knows the end
│   ├── StaleGeneration    the slot belongs to somebody else by now
│   ├── OutOfReach         the peer's memory cannot be reached from here
│   └── WritesAdrift       what moves the bytes gave writes up, and may still be at them
└── RequestError           what a client is told; carries an HTTP status
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

__all__ = [
    "AlreadyRunning",
    "BadMessage",
    "DeadlineExceeded",
    "EpdError",
    "IncompatiblePeer",
    "LeaseExpired",
    "LoadError",
    "Mistake",
    "NotRunning",
    "OutOfReach",
    "PeerGone",
    "PlacementError",
    "PoolExhausted",
    "QuarantineFull",
    "RankError",
    "RankFailed",
    "RegistrationFailed",
    "RequestError",
    "SelectorError",
    "SlotBusy",
    "StaleGeneration",
    "TopologyError",
    "TransferError",
    "Unreachable",
    "UserError",
    "WireError",
    "WritesAdrift",
]


class EpdError(Exception):
    """Root of every error raised by epdctl itself."""

    exit_status: ClassVar[int] = 70

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(EpdError):
    exit_status = 2


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing wrong in a topology file: where, what stands there, what would be right."""

    place: str  # file:line:column
    path: str  # stages.encoder.replicas
    problem: str
    remedy: str | None = None

    @property
    def position(self) -> tuple[int, int]:
        """Line and column; what has none comes last."""
        parts = self.place.rsplit(":", 2)
        return (int(parts[1]), int(parts[2])) if len(parts) == 3 else (sys.maxsize, 0)

    def __str__(self) -> str:
        where = f"{self.place}: {self.path}" if self.path else self.place
        return f"{where}: {self.problem}" + (f" ({self.remedy})" if self.remedy else "")


class TopologyError(UserError):
    """Every mistake of one topology, reported together, in the file's order."""

    def __init__(self, mistakes: Sequence[Mistake], *, hint: str | None = None) -> None:
        self.mistakes = tuple(sorted(mistakes, key=lambda mistake: mistake.position))
        super().__init__("\n".join(map(str, self.mistakes)), hint=hint)


class PlacementError(UserError):
    """The topology is valid, but this machine cannot hold it. ``mistakes``: where in the file that shows."""

    mistakes: tuple[Mistake, ...] = ()

    @classmethod
    def of(cls, mistakes: Sequence[Mistake]) -> Self:
        in_order = tuple(sorted(mistakes, key=lambda mistake: mistake.position))
        error = cls("\n".join(map(str, in_order)))
        error.mistakes = in_order
        return error


class SelectorError(UserError):
    """A rank, stage or cluster was named that is not there."""


class AlreadyRunning(UserError):
    """A cluster of this name is already up."""


class NotRunning(EpdError):
    exit_status = 3


class Unreachable(EpdError):
    exit_status = 4


class RankError(EpdError):
    exit_status = 1


class RankFailed(RankError):
    """A rank gave up: its reason and the last lines it wrote."""

    def __init__(self, rank: str, reason: str, log_tail: Sequence[str] = (), *, hint: str | None = None) -> None:
        super().__init__(f"{rank} failed: {reason}", hint=hint)
        self.rank = rank
        self.reason = reason
        self.log_tail = tuple(log_tail)


class LoadError(RankError):
    """A checkpoint that cannot be loaded as it stands; a restart would not help."""


class IncompatiblePeer(RankError):
    """Two processes that must not exchange data: both sides' values are in the message."""


class WireError(EpdError):
    """Something went wrong between two processes."""


class BadMessage(WireError):
    """A frame that the schema of its socket does not allow."""


class PeerGone(WireError):
    """The other end closed, died or was withdrawn."""


class DeadlineExceeded(WireError):
    exit_status = 5


class TransferError(EpdError):
    """Bytes could not be moved."""


class PoolExhausted(TransferError):
    """No free slot or page."""


class LeaseExpired(TransferError):
    """The right to a slot has ended."""


class RegistrationFailed(TransferError):
    """The transport cannot use this memory."""


class SlotBusy(TransferError):
    """Somebody else writes into the slot, or was never seen to stop."""


class QuarantineFull(TransferError):
    """More of a pool waits for the end of lost writers than it can spare: only a restart closes their mappings."""


class StaleGeneration(TransferError):
    """The slot was given to somebody else since the address was handed out."""


class OutOfReach(TransferError):
    """The peer is there, and its memory cannot be reached from here."""


class WritesAdrift(TransferError):
    """Writes ended in an error that does not say that they have stopped: only the end of their writer does."""


class RequestError(EpdError):
    """A request that ends with an HTTP error, in OpenAI's error shape.

    ``kind`` is OpenAI's ``type``; ``retry_after`` (seconds) goes out as a header on 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        return (
            "invalid_request_error"
            if self.status < 500 and self.status != 429
            else "server_error"
            if self.status >= 500
            else "rate_limit_error"
        )
