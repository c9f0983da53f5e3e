"""The merge of a capture, in a process beside the daemon: it takes seconds of computing, and the daemon has none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from epdctl.errors import BadMessage
from epdctl.ids import RunId
from epdctl.launch.procs import RUN_MARK
from epdctl.wire.trace import MERGE_ORDER, MERGE_REPORT, MergeOrder, MergeReport

__all__ = ["run_merge"]

LENGTH = 4  # bytes before the order, as the program reads it


async def run_merge(run: RunId, order: MergeOrder, seconds: float) -> MergeReport:
    """Its report; one with an ``error`` when there is no merged trace. Cancelled, or out of time, it kills the process.

    The process ends by itself when this one does: its standard input is open for as long as we are. It carries the
    run's mark, as all of a cluster's processes do.
    """
    argv = (sys.executable, "-m", "epdctl.telemetry.merge")
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, env=os.environ | {RUN_MARK: run})
    except OSError as error:
        return _failed(f"the merge could not be started: {error}")
    try:
        async with asyncio.timeout(seconds):
            return await _exchange(process, order)
    except TimeoutError:
        return _failed(f"the merge took longer than {seconds:g} s")
    finally:
        await _end(process)
        _clean_up(Path(order.path), process.pid)


async def _exchange(process: asyncio.subprocess.Process, order: MergeOrder) -> MergeReport:
    assert process.stdin is not None
    assert process.stdout is not None
    frame = MERGE_ORDER.encode(order)
    with contextlib.suppress(ConnectionError):  # it died; its status tells more
        process.stdin.write(len(frame).to_bytes(LENGTH, "big") + frame)
        await process.stdin.drain()
    said = await process.stdout.read()
    try:
        return MERGE_REPORT.decode(said)
    except BadMessage:
        status = await process.wait()
        return _failed(f"the merge ended with status {status} and no report; the daemon's log may say why")


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()


def _clean_up(path: Path, pid: int) -> None:
    """What a killed merge left: its file has its pid in its name."""
    path.with_name(f".{pid}.{path.name}").unlink(missing_ok=True)


def _failed(error: str) -> MergeReport:
    return MergeReport(sources=[], error=error)
