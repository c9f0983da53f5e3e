"""One torch profile of a model rank: recorded on the compute thread, written on a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from epdctl.rank.compute import ComputeThread
from epdctl.rank.service import Recorded, Written

__all__ = ["Profiler"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Capture:
    path: Path
    written: Written
    steps_left: int | None
    steps: int = 0  # so far
    recording: profile | None = None


class Profiler:
    """``start`` and ``stop`` are called on the loop, ``step`` on the compute thread after every step or batch.

    The state below belongs to the compute thread: torch's profiler sees only the thread that it was started on.
    """

    def __init__(self, compute: ComputeThread, unit: str = "step") -> None:
        """``unit``: what a step is called, where people read of it."""
        self._compute = compute
        self._unit = unit
        self._capture: _Capture | None = None

    def start(self, path: str, steps: int | None, written: Written) -> None:
        """One capture at a time: a second is told so. One in which no step ran leaves no file, and says so."""
        capture = _Capture(Path(path), written, steps)
        self._compute.post(lambda: self._begin(capture))

    def stop(self) -> None:
        """End the capture under way, if there is one."""
        self._compute.post(self._finish)

    def step(self) -> None:
        """One step is over; the last of a counted capture ends it."""
        capture = self._capture
        if capture is None:
            return
        capture.steps += 1
        if capture.steps_left is None:
            return
        capture.steps_left -= 1
        if capture.steps_left <= 0:
            self._finish()

    def _begin(self, capture: _Capture) -> None:
        if self._capture is not None:
            capture.written(Recorded(error=f"a capture to {self._capture.path} is under way"))
            return
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        try:
            capture.recording = profile(activities=[ProfilerActivity.CPU, *gpu])
            capture.recording.start()
        except RuntimeError as error:  # another tool holds the profiler, or the driver refuses
            capture.written(Recorded(error=f"the profiler did not start: {error}"))
            return
        self._capture = capture

    def _finish(self) -> None:
        capture, self._capture = self._capture, None
        if capture is None or capture.recording is None:
            return
        try:
            capture.recording.stop()
        except RuntimeError as error:
            capture.written(Recorded(error=f"the profiler did not stop: {error}"))
            return
        if capture.steps == 0:
            capture.written(Recorded(note=f"no {self._unit} ran while it recorded, so there is no trace"))
            return
        threading.Thread(target=_export, args=(capture, capture.recording), name="export", daemon=True).start()


def _export(capture: _Capture, recording: profile) -> None:
    """Write beside the target and rename, so that whoever sees the file sees all of it."""
    partial = capture.path.with_name(f".{os.getpid()}.{capture.path.name}")
    try:
        capture.path.parent.mkdir(parents=True, exist_ok=True)
        recording.export_chrome_trace(str(partial))
        partial.replace(capture.path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        log.warning("no trace at %s: %s", capture.path, error)
        capture.written(Recorded(error=f"{capture.path} was not written: {error}"))
    else:
        capture.written(Recorded())
