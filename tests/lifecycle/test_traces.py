"""One trace of ranks whose clocks, files and idleness differ: a real daemon, real children, a real merge."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from epdctl.errors import UserError
from epdctl.ids import RankName, RunId
from epdctl.supervisor.merging import run_merge
from epdctl.supervisor.sweep import find
from epdctl.wire.control import CaptureReply, RankState
from epdctl.wire.trace import Kind, MergeOrder, TraceSource
from tests.lifecycle.conftest import Begin
from tests.support.scripted_rank import Script

READY = RankState.READY
RUN = RunId("0123456789abcdef")


def errors_of(reply: CaptureReply) -> dict[str, str | None]:
    return {str(result.rank): result.error for result in reply.results}


AHEAD = {"gateway/0": 86400.0, "encoder/0": 7200.0, "prefill/0": -3600.0, "decode/0": -86400.0}  # seconds


def test_ranks_whose_clocks_are_hours_apart_make_one_trace_in_true_order(begin: Begin) -> None:
    """Each notes one hop, half a second after the one before; all of them have the same pid and tid."""
    hops = {
        "gateway/0": (Kind.REQUEST, "received"),
        "encoder/0": (Kind.ENCODE, "writing"),
        "prefill/0": (Kind.PREFILL, "running"),
        "decode/0": (Kind.DECODE, "running"),
    }
    scripts = {
        name: Script(clock_ahead_s=ahead, hop=hops[name], hop_at_s=index / 2)
        for index, (name, ahead) in enumerate(AHEAD.items())
    }
    cluster = begin(scripts)
    cluster.until_ready()
    cluster.client.start_captures(steps=1)
    reply = cluster.client.stop_captures()
    for result in reply.results:
        assert result.clock_offset_us is not None
        assert result.clock_uncertainty_us is not None
        assert abs(result.clock_offset_us - AHEAD[result.rank] * 1e6) <= result.clock_uncertainty_us
    assert reply.merged is not None
    assert (reply.merge_error, reply.arrows, reply.arrows_backwards) == (None, 2, 0)
    with gzip.open(reply.merged) as file:
        trace = json.load(file)
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    steps = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for name in {hop for _, hop in hops.values()} | {"step"}:
        found = sorted((event["ts"], names[event["pid"]]) for event in steps if event["name"] == name)
        ranks = list(dict.fromkeys(rank for _, rank in found))
        assert ranks == [rank for rank in AHEAD if rank in ranks], found
    assert len({(event["pid"], event["tid"]) for event in steps}) == 7, "a track for hops, and one for a profile"


def test_one_rank_s_broken_trace_is_its_own_fault_and_an_idle_one_is_no_fault(begin: Begin) -> None:
    scripts = {"encoder/0": Script(broken_trace=True), "encoder/1": Script(capture_idle=True), "decode/0": Script()}
    cluster = begin(scripts)
    cluster.until_ready()
    cluster.client.start_captures(steps=1)
    reply = cluster.client.stop_captures()
    errors = errors_of(reply)
    assert "cannot be read to the end" in str(errors.pop("encoder/0"))
    assert errors == {"encoder/1": None, "decode/0": None}
    notes = {str(result.rank): (result.path is None, result.note) for result in reply.results}
    assert notes["encoder/1"] == (True, "nothing ran")
    assert reply.merged is not None


def test_the_daemon_answers_while_it_merges_and_a_stop_ends_the_merge(begin: Begin) -> None:
    """The trace is a fifo that nobody writes to: the merge waits for it, and nobody else waits for the merge."""
    cluster = begin({"decode/0": Script(capture_fifo=True)})
    cluster.until_ready()
    cluster.client.start_captures(steps=1)
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(cluster.client.stop_captures)
        while not (merging := [name for name in processes_of(cluster.daemon.pid) if "epdctl.telemetry.merge" in name]):
            assert cluster.rank("decode/0").state is READY
        assert len(merging) == 1
        with pytest.raises(UserError, match="already"):
            cluster.client.start_captures()
        cluster.down()
        assert stopped.exception() is not None or stopped.result().merged is None
    assert not processes_of(cluster.daemon.pid)


def processes_of(pid: int) -> list[str]:
    """Command lines of its children."""
    try:
        children = psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []
    lines = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(child.cmdline()))
    return lines


def order_of(path: Path, *traces: Path) -> MergeOrder:
    sources = [TraceSource(rank=RankName(f"decode/{at}"), trace=str(trace)) for at, trace in enumerate(traces)]
    return MergeOrder(capture="c", cluster="k", began=0, path=str(path), sources=sources)


def test_a_merge_that_cannot_be_written_or_takes_too_long_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def scene() -> None:
        nowhere = await run_merge(RUN, order_of(tmp_path / "no" / "trace.json.gz"), 60)
        assert "cannot be written" in str(nowhere.error)
        slow = await run_merge(RUN, order_of(tmp_path / "trace.json.gz", fifo), 1.0)
        assert slow.error == "the merge took longer than 1 s"

    asyncio.run(scene())
    assert os.listdir(tmp_path) == ["fifo"]
    assert find(RUN) == []


def test_a_merge_that_dies_is_an_error(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def scene() -> None:
        merging = asyncio.create_task(run_merge(RUN, order_of(tmp_path / "trace.json.gz", fifo), 60))
        with await asyncio.to_thread(fifo.open, "w"):  # it reads: it has begun
            (process,) = find(RUN)
            os.kill(process.pid, signal.SIGKILL)
            assert "ended with status -9" in str((await merging).error)

    asyncio.run(scene())
    assert os.listdir(tmp_path) == ["fifo"]
