"""Captures: every selected model rank records one profiler trace, and each of them is accounted for.

A rank writes its trace, dies, or misses a deadline; nothing waits longer than that.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from epdctl.errors import UserError
from epdctl.ids import MODEL_STAGES, Incarnation, RankName
from epdctl.wire.control import CaptureReply, CaptureResult, StartCaptures
from epdctl.wire.lifecycle import CaptureWritten, StartCapture, StopCapture, SupervisorToRank

__all__ = ["Captures", "Deadlines", "Studio"]


class Studio(Protocol):
    """What captures need of the daemon."""

    def connected(self, rank: RankName) -> Incarnation | None:
        """The incarnation that can be spoken to; None when the rank has none."""
        ...

    def tell(self, rank: RankName, message: SupervisorToRank) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Deadlines:
    record: float = 60.0  # from the start to being told to stop: a busy rank records 20 MB a second
    write: float = 120.0  # from being told to stop to the file


@dataclass(slots=True)
class _Recording:
    capture: str
    pending: dict[RankName, tuple[Incarnation, Path]] = field(default_factory=dict)
    results: dict[RankName, CaptureResult] = field(default_factory=dict)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    timer: asyncio.TimerHandle | None = None

    def settle(self, result: CaptureResult) -> None:
        self.pending.pop(result.rank, None)
        self.results[result.rank] = result
        if not self.pending:
            self.finish()

    def finish(self) -> None:
        self.finished.set()
        if self.timer is not None:
            self.timer.cancel()

    def reply(self) -> CaptureReply:
        """Of a rank that still records: where its file will be."""
        told = {rank: CaptureResult(rank=rank, path=str(path)) for rank, (_, path) in self.pending.items()}
        return CaptureReply(capture=self.capture, results=[*{**self.results, **told}.values()])


class Captures:
    """At most one capture at a time."""

    def __init__(self, studio: Studio, default: Path, deadlines: Deadlines | None = None) -> None:
        self._studio = studio
        self._default = default
        self._deadlines = deadlines or Deadlines()
        self._recording: _Recording | None = None
        self._told = True  # the newest recording's results were handed to somebody
        self._numbers = itertools.count(1)

    def start(self, command: StartCaptures, ranks: Sequence[RankName]) -> CaptureReply:
        """Answers at once, with where the files will be; ranks end after ``steps``, at ``stop`` or at the deadline."""
        if self._recording is not None and not self._recording.finished.is_set():
            raise UserError("a capture is being recorded already", hint="end it with: epdctl profile stop")
        capture = f"{time.strftime('%Y%m%d-%H%M%S')}-{next(self._numbers)}"
        folder = _make(Path(command.output) if command.output else self._default / capture)
        recording = self._recording = _Recording(capture)
        self._studio.note(f"capture {capture} in {folder}")
        self._ask(recording, command, ranks, folder)
        self._told = not recording.pending
        return recording.reply()

    async def stop(self) -> CaptureReply:
        recording = self._recording
        if recording is None or (recording.finished.is_set() and self._told):
            raise UserError("no capture is being recorded", hint="begin one with: epdctl profile start")
        if not recording.finished.is_set():
            self._stop_recording(recording)
        return await self._results(recording)

    def patience(self, rank: RankName) -> float:
        """Seconds that ``rank`` may be silent for longer than usual: torch ends and writes a recording without once
        letting another thread of the process run, the one with the heartbeats included."""
        recording = self._recording
        return self._deadlines.write if recording is not None and rank in recording.pending else 0.0

    def written(self, rank: RankName, incarnation: Incarnation, message: CaptureWritten) -> None:
        recording = self._recording
        if recording is None or message.capture != recording.capture:
            return  # of a capture that was given up
        expected, path = recording.pending.get(rank, (None, None))
        if expected != incarnation:
            return
        done = None if message.error else message.path or str(path)
        recording.settle(CaptureResult(rank=rank, path=done, error=message.error))

    def died(self, rank: RankName, incarnation: Incarnation) -> None:
        recording = self._recording
        if recording is not None and recording.pending.get(rank, (None, None))[0] == incarnation:
            recording.settle(CaptureResult(rank=rank, error="died while it was recording"))

    def _ask(self, recording: _Recording, command: StartCaptures, ranks: Sequence[RankName], folder: Path) -> None:
        # An unselective capture leaves out the processes without a model; one asked for by name is told why not.
        for rank in ranks:
            if rank.stage in MODEL_STAGES:
                self._ask_one(recording, rank, command.steps, folder)
            elif command.ranks and "all" not in command.ranks:
                recording.results[rank] = CaptureResult(rank=rank, error="has no model to profile")
        if not recording.pending:
            recording.finish()
        else:
            recording.timer = self._later(self._deadlines.record, recording)

    def _ask_one(self, recording: _Recording, rank: RankName, steps: int | None, folder: Path) -> None:
        incarnation = self._studio.connected(rank)
        if incarnation is None:
            recording.results[rank] = CaptureResult(rank=rank, error="is not running")
            return
        path = folder / f"{rank.file_stem}.{incarnation}.trace.json"
        recording.pending[rank] = (incarnation, path)
        self._studio.tell(rank, StartCapture(capture=recording.capture, path=str(path), steps=steps))

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
            recording.settle(CaptureResult(rank=rank, error=error))

    async def _results(self, recording: _Recording) -> CaptureReply:
        await recording.finished.wait()  # bounded: a timer runs for as long as anything is pending
        self._told = True
        return recording.reply()


def _make(folder: Path) -> Path:
    if not folder.is_absolute():
        raise UserError(f"the directory for captures must be absolute, not {str(folder)!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory for captures: {error}") from error
    return folder
