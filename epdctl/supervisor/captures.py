"""Captures: every selected rank records its share, each of them is accounted for, and all of it becomes one trace.

A rank writes, dies, or misses a deadline; nothing waits longer than that. What follows is the measuring of its clock
and the merge, which have deadlines of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from epdctl.errors import UserError
from epdctl.ids import MODEL_STAGES, Incarnation, RankName, Stage
from epdctl.supervisor.clocks import Clocks
from epdctl.wire.control import CaptureReply, CaptureResult, StartCaptures
from epdctl.wire.lifecycle import CaptureWritten, ClockTold, StartCapture, StopCapture, SupervisorToRank
from epdctl.wire.trace import MergeOrder, MergeReport, TraceSource

__all__ = ["MERGED_NAME", "Captures", "Deadlines", "Merge", "Studio"]

MERGED_NAME = "trace.json.gz"
_TRACE, _HOPS = ".trace.json", ".hops.json"
_FILES = (_TRACE, _HOPS, MERGED_NAME)
NO_CLOCK = "its clock was not told, so its times are as it wrote them"

Merge = Callable[[MergeOrder, float], Awaitable[MergeReport]]  # within so many seconds

_PIPELINE = list(Stage)  # from the front to the back


class Studio(Protocol):
    """What captures need of the daemon."""

    @property
    def cluster(self) -> str: ...

    def connected(self, rank: RankName) -> Incarnation | None:
        """The incarnation that can be spoken to; None when the rank has none."""
        ...

    def tell(self, rank: RankName, message: SupervisorToRank) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Deadlines:
    record: float = 60.0  # from the start to being told to stop: a busy rank records 20 MB a second
    write: float = 120.0  # from being told to stop to the file
    clocks: float = 2.0  # for the last questions about them
    merge: float = 180.0


@dataclass(slots=True)
class _Recording:
    """One capture. ``pending``: who still records, and what will become of it if all goes well."""

    capture: str
    folder: Path
    began: int  # nanoseconds of unix time
    clocks: Clocks
    pending: dict[RankName, tuple[Incarnation, CaptureResult]] = field(default_factory=dict)
    results: dict[RankName, CaptureResult] = field(default_factory=dict)
    incarnations: dict[RankName, Incarnation] = field(default_factory=dict)
    report: MergeReport | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None

    @property
    def merged(self) -> Path:
        return self.folder / MERGED_NAME

    def expects(self, rank: RankName, incarnation: Incarnation) -> CaptureResult | None:
        """What was planned for this very process, while it is pending."""
        known, planned = self.pending.get(rank, (None, None))
        return planned if known == incarnation else None

    @property
    def followers_only(self) -> bool:
        """Whoever is left has nothing to count, and those who had are done."""
        counted = any(rank.stage in MODEL_STAGES for rank in self.incarnations)
        return counted and not any(rank.stage in MODEL_STAGES for rank in self.pending)

    def reply(self) -> CaptureReply:
        """Of a rank that still records: where its files will be."""
        told = {rank: planned for rank, (_, planned) in self.pending.items()}
        results = sorted({**self.results, **told}.values(), key=_place)
        report = self.report
        if report is None:
            return CaptureReply(capture=self.capture, results=results)
        return CaptureReply(
            capture=self.capture,
            results=results,
            merged=str(self.merged) if report.error is None else None,
            merge_error=report.error,
            arrows=report.arrows,
            arrows_backwards=report.backwards,
        )


class Captures:
    """At most one capture at a time."""

    def __init__(self, studio: Studio, default: Path, merge: Merge, deadlines: Deadlines | None = None) -> None:
        self._studio = studio
        self._default = default
        self._merge = merge
        self._deadlines = deadlines or Deadlines()
        self._recording: _Recording | None = None
        self._told = True  # the newest recording's results were handed to somebody
        self._numbers = itertools.count(1)
        self._concluding: asyncio.Task[None] | None = None

    def start(self, command: StartCaptures, ranks: Sequence[RankName]) -> CaptureReply:
        """Answers at once, with where the files will be; ranks end after ``steps``, at ``stop`` or at the deadline."""
        if self._recording is not None and not self._recording.finished.is_set():
            raise UserError("a capture is being recorded already", hint="end it with: epdctl profile stop")
        capture = f"{time.strftime('%Y%m%d-%H%M%S')}-{next(self._numbers)}"
        folder = _fresh(Path(command.output) if command.output else self._default / capture)
        recording = self._recording = _Recording(capture, folder, time.time_ns(), Clocks(self._studio.tell))
        self._studio.note(f"capture {capture} in {folder}")
        for rank in ranks:
            self._ask(recording, rank, command.steps)
        if recording.pending:
            recording.timer = self._later(self._deadlines.record, recording)
        else:
            recording.finished.set()
        self._told = not recording.pending
        return recording.reply()

    async def stop(self) -> CaptureReply:
        recording = self._recording
        if recording is None or (recording.finished.is_set() and self._told):
            raise UserError("no capture is being recorded", hint="begin one with: epdctl profile start")
        if recording.pending:
            self._stop_recording(recording)
        await recording.finished.wait()  # bounded: by a timer while anything is pending, then by two deadlines
        self._told = True
        return recording.reply()

    async def close(self) -> None:
        """A merge that is under way is given up."""
        if self._concluding is not None:
            self._concluding.cancel()
            await asyncio.gather(self._concluding, return_exceptions=True)

    def patience(self, rank: RankName) -> float:
        """Seconds that ``rank`` may be silent for longer than usual: torch ends and writes a recording without once
        letting another thread of the process run, the one with the heartbeats included."""
        recording = self._recording
        return self._deadlines.write if recording is not None and rank in recording.pending else 0.0

    # -- what ranks say --

    def hear(self, rank: RankName, incarnation: Incarnation, message: CaptureWritten | ClockTold) -> None:
        if isinstance(message, CaptureWritten):
            self._written(rank, incarnation, message)
        elif self._recording is not None:
            self._recording.clocks.told(rank, incarnation, message)

    def _written(self, rank: RankName, incarnation: Incarnation, message: CaptureWritten) -> None:
        recording = self._recording
        if recording is None or message.capture != recording.capture:
            return  # of a capture that was given up
        if recording.expects(rank, incarnation) is None:
            return
        word = CaptureResult(
            rank=rank,
            path=message.path,
            hops=message.hops,
            error=message.error,
            note=message.note,
        )
        self._settle(recording, word)

    def died(self, rank: RankName, incarnation: Incarnation) -> None:
        recording = self._recording
        if recording is None:
            return
        recording.clocks.gone(rank, incarnation)
        if recording.expects(rank, incarnation) is not None:
            self._settle(recording, CaptureResult(rank=rank, error="died while it was recording"))

    # -- one recording --

    def _ask(self, recording: _Recording, rank: RankName, steps: int | None) -> None:
        incarnation = self._studio.connected(rank)
        if incarnation is None:
            recording.results[rank] = CaptureResult(rank=rank, error="is not running")
            return
        stem = f"{recording.folder}/{rank.file_stem}.{incarnation}"
        path = f"{stem}{_TRACE}" if rank.stage in MODEL_STAGES else None
        planned = CaptureResult(rank=rank, path=path, hops=f"{stem}{_HOPS}")
        recording.pending[rank] = (incarnation, planned)
        recording.incarnations[rank] = incarnation
        recording.clocks.ask(rank, incarnation)
        order = StartCapture(capture=recording.capture, path=path, hops=planned.hops, steps=steps if path else None)
        self._studio.tell(rank, order)

    def _settle(self, recording: _Recording, result: CaptureResult) -> None:
        recording.pending.pop(result.rank, None)
        recording.results[result.rank] = result
        if not recording.pending:
            self._conclude_soon(recording)
        elif recording.followers_only:
            self._stop_recording(recording)

    def _later(self, seconds: float, recording: _Recording) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._stop_recording, recording)

    def _stop_recording(self, recording: _Recording) -> None:
        """Tell whoever still records to write, and give up on what is not there by the deadline."""
        for rank in list(recording.pending):
            self._studio.tell(rank, StopCapture(capture=recording.capture))
        if recording.timer is not None:
            recording.timer.cancel()
        seconds = self._deadlines.write
        recording.timer = asyncio.get_running_loop().call_later(seconds, self._give_up, recording)

    def _give_up(self, recording: _Recording) -> None:
        error = f"did not write its trace within {self._deadlines.write:g} s"
        for rank in list(recording.pending):
            recording.pending.pop(rank)
            recording.results[rank] = CaptureResult(rank=rank, error=error)
        self._conclude_soon(recording)

    # -- the merge --

    def _conclude_soon(self, recording: _Recording) -> None:
        if recording.timer is not None:
            recording.timer.cancel()
        self._concluding = asyncio.create_task(self._conclude(recording), name="merge of a capture")

    async def _conclude(self, recording: _Recording) -> None:
        try:
            await self._measure(recording)
            sources = [self._source(result) for result in sorted(recording.results.values(), key=_place)]
            there = [source for source in sources if source.trace is not None or source.hops is not None]
            if there:
                await self._merge_all(recording, there)
        finally:
            recording.finished.set()

    async def _measure(self, recording: _Recording) -> None:
        """Once more, now that ranks have nothing else to do; then note what was found."""
        for rank, incarnation in recording.incarnations.items():
            if self._studio.connected(rank) == incarnation:
                recording.clocks.ask(rank, incarnation)
        await recording.clocks.settle(self._deadlines.clocks)
        for rank, incarnation in recording.incarnations.items():
            offset = recording.clocks.offset(rank, incarnation)
            result = recording.results[rank]
            if offset is None:
                recording.results[rank] = msgspec.structs.replace(result, note=_joined(result.note, NO_CLOCK))
            else:
                recording.results[rank] = msgspec.structs.replace(
                    result, clock_offset_us=offset.us, clock_uncertainty_us=offset.uncertainty_us
                )

    def _source(self, result: CaptureResult) -> TraceSource:
        return TraceSource(
            rank=result.rank,
            trace=result.path,
            hops=result.hops,
            offset_us=result.clock_offset_us or 0.0,
            uncertainty_us=result.clock_uncertainty_us,
            note=result.error or result.note,
        )

    async def _merge_all(self, recording: _Recording, sources: list[TraceSource]) -> None:
        order = MergeOrder(
            capture=recording.capture,
            cluster=self._studio.cluster,
            began=recording.began,
            path=str(recording.merged),
            sources=sources,
        )
        report = recording.report = await self._merge(order, self._deadlines.merge)
        for merged in report.sources:
            result = recording.results[merged.rank]
            recording.results[merged.rank] = msgspec.structs.replace(
                result, error=merged.error or result.error, note=_joined(result.note, merged.note)
            )
        self._studio.note(f"capture {recording.capture}: {report.error or recording.merged}")


def _joined(*notes: str | None) -> str | None:
    return "; ".join(filter(None, notes)) or None


def _place(result: CaptureResult) -> tuple[int, int, int]:
    rank = result.rank
    return _PIPELINE.index(rank.stage), rank.replica, rank.shard or 0


def _fresh(folder: Path) -> Path:
    """The directory, made if need be. Raises UserError for one with an earlier recording: two in one place are none."""
    if not folder.is_absolute():
        raise UserError(f"the directory for captures must be absolute, not {str(folder)!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [path.name for path in folder.iterdir() if path.name.endswith(_FILES)]
    except OSError as error:
        raise UserError(f"cannot make the directory for captures: {error}") from error
    if taken:
        raise UserError(
            f"{folder} holds a recording already ({min(taken)})",
            hint="name another directory, or leave --output out: then every recording has one of its own",
        )
    return folder
