"""What a rank and its supervisor tell each other, over one unix stream per incarnation.

The rank connects, says Hello, reports loading, says Ready once, then beats. End of stream is the end of the process.
"""

from __future__ import annotations

import enum

from epdctl.ids import Incarnation, RankName, RunId, Stage
from epdctl.wire.config import RankSpec
from epdctl.wire.message import Codec, Message, Part

__all__ = [
    "RANK_TO_SUPERVISOR",
    "SPEC",
    "SUPERVISOR_TO_RANK",
    "Absent",
    "AskFigures",
    "CaptureWritten",
    "ClockTold",
    "Drain",
    "Drained",
    "Embeddings",
    "Endpoints",
    "Facts",
    "Fatal",
    "FatalKind",
    "Figures",
    "Heartbeat",
    "Hello",
    "Loading",
    "Peer",
    "PeersChanged",
    "Prove",
    "Proved",
    "RankFigures",
    "RankToSupervisor",
    "Ready",
    "StartCapture",
    "StopCapture",
    "SupervisorToRank",
    "TellClock",
    "Unfit",
]


class Endpoints(Part, frozen=True):
    """Where a ready rank can be reached. Each incarnation has its own."""

    inbox: str | None = None  # ZMQ ROUTER: control messages of the data plane
    transfer: str | None = None  # where its transport listens
    http: str | None = None  # http://host:port
    encode: str | None = None  # of a mono rank: a second inbox, which takes pictures as an encoder router's does


class Peer(Part, frozen=True, eq=False):
    """One rank that others may have links to. It stays the same peer when only ``accepting`` changes."""

    rank: RankName
    stage: Stage
    incarnation: Incarnation
    endpoints: Endpoints
    epoch: int = 0  # another one after every absence: what was asked of an earlier one has been given up
    accepting: bool = True  # False: it finishes what it has, and is given nothing new

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peer) and self._self == other._self

    def __ne__(self, other: object) -> bool:  # a Struct has one of its own, which goes by identity
        return not self == other

    def __hash__(self) -> int:
        return hash(self._self)

    @property
    def _self(self) -> tuple[RankName, Stage, Incarnation, Endpoints, int]:
        return self.rank, self.stage, self.incarnation, self.endpoints, self.epoch


class Absent(Part, frozen=True):
    """One planned rank that nobody may have links to."""

    rank: RankName
    stage: Stage
    incarnation: Incarnation  # its latest; 0 before the first
    died: bool = False  # that one ended by a fault, and not because somebody wanted it to
    hopeless: str | None = None  # why it is not there, when nobody is going to start it
    reason: str = ""  # why it is not there, whatever will become of it


class Facts(Part, frozen=True):
    """What ranks must have in common before they exchange data. None: this rank has no such thing."""

    protocol: int | None = None  # of these messages
    transformers: str | None = None  # its version: halves of a model differ between versions
    checkpoint: str | None = None  # a fingerprint of its files
    revision: str | None = None
    image_processor: str | None = None
    dtype: str | None = None
    width: int | None = None  # values of one embedding
    kv_pages: str | None = None  # layout of a page
    transport: str | None = None


class FatalKind(enum.StrEnum):
    """Why a rank cannot go on: decides whether a restart is worth it, and what a person reads."""

    CHECKPOINT = "checkpoint"  # missing, unreadable, missing or mismatched keys
    CONFIG = "config"
    PORT = "port"
    MEMORY = "memory"
    INCOMPATIBLE = "incompatible"
    CRASH = "crash"  # anything else; restartable


class Hello(Message, frozen=True):
    run: RunId
    rank: RankName
    incarnation: Incarnation
    protocol: int
    token: str
    pid: int


class Loading(Message, frozen=True):
    phase: str  # "imports", "weights", "pools", …
    done: int = 0
    total: int = 0


class Ready(Message, frozen=True):
    endpoints: Endpoints
    facts: Facts | None = None  # of a rank with a model
    transfer: str | None = None  # its transport's own word, for people: "cuda-ipc, 211.1 GB/s to itself"


class Embeddings(Part, frozen=True):
    """What became of an encoder's items: their embeddings were made, shared with one in flight, or remembered."""

    made: int = 0
    shared: int = 0
    cached: int = 0
    kept_bytes: int = 0  # of those that are remembered now
    prepared_bytes: int = 0  # of media that are prepared for the tower, or being prepared
    unreadable: int = 0  # messages that were dropped


class Heartbeat(Message, frozen=True):
    """``completed`` advances with work done: liveness is progress, not an answer to a ping."""

    inflight: int = 0
    waiting: int = 0  # of them: for memory, for a batch, for a rank
    completed: int = 0
    free_pages: int = 0
    total_pages: int = 0
    leases: int = 0  # on memory that peers write to; an idle rank has none
    unhealthy: str | None = None  # the rank's own reason, if it knows one
    standstill_s: float = 0.0  # how long the piece of work under way has run without an end
    embeddings: Embeddings | None = None  # of a rank with a tower


class Drained(Message, frozen=True):
    """Nothing is in flight any more."""


class CaptureWritten(Message, frozen=True):
    capture: str
    path: str | None = None
    hops: str | None = None
    error: str | None = None
    note: str | None = None  # why there is no trace, where that is no fault


class ClockTold(Message, frozen=True):
    """Nanoseconds of unix time on the rank's clock: when the question came, and when this went out."""

    asked: int  # the question's own
    heard: int
    told: int


class Proved(Message, frozen=True):
    """``fault``: why this rank is not fit to serve, as its own canary has just shown."""

    number: int  # of the question
    fault: str | None = None
    busy: bool = False  # real work took all the time there was for it, and got done


class AskFigures(Message, frozen=True):
    """Of every rank; a gateway's metrics tell them."""


class Fatal(Message, frozen=True):
    """Last words: the process ends after this."""

    kind: FatalKind
    text: str
    restartable: bool


class Drain(Message, frozen=True):
    budget_s: float


class PeersChanged(Message, frozen=True):
    """Every rank of the cluster, whole; a higher version replaces a lower one."""

    version: int
    peers: list[Peer]
    absent: list[Absent] = []


class StartCapture(Message, frozen=True):
    capture: str
    path: str | None = None  # the profiler's trace this rank is to write; None: it has no model
    hops: str | None = None  # the file for what it notes of requests
    steps: int | None = None  # engine steps or encoder batches; None: until StopCapture


class StopCapture(Message, frozen=True):
    capture: str


class Prove(Message, frozen=True):
    """To a rank with a tower: encode the canary now, whatever else there is, and say what came of it."""

    number: int


class TellClock(Message, frozen=True):
    asked: int  # nanoseconds of unix time, on the supervisor's clock


class RankFigures(Part, frozen=True):
    """One rank as the supervisor knows it. ``beat``: its last; None before its first."""

    rank: RankName
    stage: Stage
    ready: bool
    restarts: int  # that a fault made necessary
    restarts_asked: int = 0
    rss_bytes: int | None = None
    beat: Heartbeat | None = None


class Figures(Message, frozen=True):
    ranks: list[RankFigures]


class Unfit(Message, frozen=True):
    """What this rank said at Ready is not what the others said: it must not serve, and a restart does not help."""

    text: str


RankToSupervisor = (
    Hello | Loading | Ready | Heartbeat | Drained | CaptureWritten | ClockTold | Proved | AskFigures | Fatal
)
SupervisorToRank = Drain | PeersChanged | StartCapture | StopCapture | TellClock | Prove | Figures | Unfit

RANK_TO_SUPERVISOR: Codec[RankToSupervisor] = Codec(RankToSupervisor)
SUPERVISOR_TO_RANK: Codec[SupervisorToRank] = Codec(SupervisorToRank)
SPEC: Codec[RankSpec] = Codec(RankSpec)
