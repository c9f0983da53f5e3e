"""Several ranks' files as one trace: whose clocks differ, whose pids are equal, whose files are broken or huge."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from epdctl.ids import RankName, RequestId
from epdctl.telemetry.merge import LENGTH, merge
from epdctl.wire.trace import (
    MERGE_ORDER,
    MERGE_REPORT,
    Hop,
    HopList,
    Kind,
    MergeOrder,
    MergeReport,
    TraceSource,
)

NOON = 1_795_000_000_000_000_000  # unix time, ns
MS = 1_000_000
Event = dict[str, Any]


def trace(path: Path, events: list[Event], base: int = NOON) -> str:
    path.write_text(json.dumps({"baseTimeNanoseconds": base, "traceEvents": events}, indent=1))
    return str(path)


def hops(path: Path, *listed: Hop, left_out: int = 0) -> str:
    path.write_bytes(msgspec.json.encode(HopList(until=NOON + 900 * MS, hops=list(listed), left_out=left_out)))
    return str(path)


def hop(kind: Kind, name: str, began_ms: float, ended_ms: float | None, *, way: int = 1, inner: bool = False) -> Hop:
    ended = None if ended_ms is None else NOON + round(ended_ms * MS)
    began = NOON + round(began_ms * MS)
    return Hop(kind=kind, request=RequestId("r1"), attempt=1, way=way, name=name, began=began, ended=ended, inner=inner)


def ahead(hop: Hop, ms: int) -> Hop:
    """As a clock shows it that is so much ahead."""
    return msgspec.structs.replace(hop, began=hop.began + ms * MS, ended=(hop.ended or 0) + ms * MS)


def order(tmp_path: Path, *sources: TraceSource) -> MergeOrder:
    return MergeOrder(capture="c", cluster="k", began=NOON, path=str(tmp_path / "trace.json.gz"), sources=[*sources])


def merged(tmp_path: Path, *sources: TraceSource) -> tuple[dict[str, Any], MergeReport]:
    report = merge(order(tmp_path, *sources))
    with gzip.open(tmp_path / "trace.json.gz") as file:
        return json.load(file), report


def slices(found: dict[str, Any]) -> list[Event]:
    return [event for event in found["traceEvents"] if event["ph"] == "X"]


def named(found: dict[str, Any], kind: str) -> dict[tuple[int, int], str]:
    metadata = (event for event in found["traceEvents"] if event["ph"] == "M" and event["name"] == kind)
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in metadata}


def x(name: str, ts: float, dur: float = 1.0, *, pid: int | str = 7, tid: int | str = 7) -> Event:
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur}


def test_clocks_that_differ_by_hours_come_out_in_the_order_of_what_happened(tmp_path: Path) -> None:
    hour = 3_600_000
    offsets = {"gateway/0": 0, "prefill/0": hour, "decode/0": -hour}
    listed = {
        "gateway/0": [hop(Kind.REQUEST, "received", 0, 10), hop(Kind.REQUEST, "handoff", 52, 60)],
        "prefill/0": [hop(Kind.PREFILL, "waiting", 11, 20), hop(Kind.PREFILL, "running", 20, 50)],
        "decode/0": [
            hop(Kind.DECODE, "waiting", 11, 12),
            hop(Kind.DECODE, "landing", 12, 51),
            hop(Kind.DECODE, "running", 51, 60),
        ],
    }
    sources = [
        TraceSource(
            rank=RankName(name),
            trace=trace(tmp_path / f"{index}.json", [x(name, 0)], NOON + (index + 100 + offset) * MS),
            hops=hops(tmp_path / f"{index}.hops", *(ahead(each, offset) for each in listed[name])),
            offset_us=offset * 1000.0,
            uncertainty_us=40.0,
        )
        for index, (name, offset) in enumerate(offsets.items())
    ]
    found, report = merged(tmp_path, *sources)
    times = {event["name"]: event["ts"] for event in slices(found)}
    assert [times[name] - times["gateway/0"] for name in offsets] == [0, 1000, 2000]
    absolute = found["baseTimeNanoseconds"] + times["gateway/0"] * 1000
    assert absolute == NOON + 100 * MS
    assert (report.arrows, report.backwards) == (4, 0)
    unaligned = [msgspec.structs.replace(source, offset_us=0.0) for source in sources]
    assert merged(tmp_path, *unaligned)[1].backwards > 0, "it is the offsets that did it"


def test_equal_pids_and_arrow_ids_of_two_hosts_do_not_mix(tmp_path: Path) -> None:
    def file(number: int) -> str:
        flow = {"cat": "ac2g", "name": "ac2g", "id": 5, "pid": 7, "tid": 7, "ts": 2.0}
        gpu = {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "ts": 0.0, "args": {"labels": "GPU 0"}}
        stream = {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "ts": 0.0, "args": {"name": "stream 7"}}
        events = [
            x("op", 1.0),
            x("kernel", 3.0, pid=0),
            {"ph": "s", **flow},
            {"ph": "f", "bp": "e", **flow, "pid": 0},
            x("span", 0.0, pid="Spans", tid="PyTorch Profiler"),
            {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 9.0},
            gpu,
            stream,
        ]
        return trace(tmp_path / f"{number}.json", events)

    sources = [TraceSource(rank=RankName(f"encoder/{number}"), trace=file(number)) for number in range(2)]
    found, report = merged(tmp_path, *sources)
    processes = named(found, "process_name")
    assert [(pid, name) for (pid, _), name in processes.items()] == [(1, "encoder/0"), (2, "encoder/1")]
    threads = [(event["name"], event["pid"], event["tid"]) for event in slices(found)]
    assert sorted((name, pid) for name, pid, _ in threads) == [
        (name, pid) for name in ("kernel", "op", "span") for pid in (1, 2)
    ]
    assert len({tid for _, _, tid in threads}) == 6, "each thread has a number that no other has"
    names = named(found, "thread_name")
    assert sorted(names[pid, tid] for name, pid, tid in threads if name == "kernel") == ["GPU 0 stream 7"] * 2
    flows = {(event["id"], event["pid"]) for event in found["traceEvents"] if event["ph"] in "sf"}
    assert len(flows) == 2
    assert [source.events for source in report.sources] == [5, 5]


def test_a_broken_share_is_named_and_the_others_are_whole(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(Path(trace(broken, [x("first", 0.0), x("second", 1.0)])).read_text()[:-60])
    no_hops = tmp_path / "no.hops"
    no_hops.write_text('{"until": 1, "hops": [{"kind": "surprise"}]}')
    found, report = merged(
        tmp_path,
        TraceSource(rank=RankName("encoder/0"), trace=str(broken)),
        TraceSource(rank=RankName("encoder/1"), trace=str(tmp_path / "missing.json"), hops=str(no_hops)),
        TraceSource(rank=RankName("decode/0"), trace=trace(tmp_path / "good.json", [x("good", 0.0)])),
    )
    assert [event["name"] for event in slices(found)] == ["first", "good"]
    first, second, third = report.sources
    assert "cannot be read to the end" in str(first.error)
    assert "hops cannot be read" in str(second.error)
    assert "No such file" in str(second.error)
    assert third.error is None
    assert found["otherData"]["ranks"]["encoder/0"]["error"] == first.error


def test_a_gpu_whose_kernels_nobody_saw_is_noted(tmp_path: Path) -> None:
    def source(number: int, gpus: int, *events: Event) -> TraceSource:
        path = tmp_path / f"{number}.json"
        properties = [{"id": gpu} for gpu in range(gpus)]
        path.write_text(json.dumps({"deviceProperties": properties, "traceEvents": [x("op", 0.0), *events]}))
        return TraceSource(rank=RankName(f"decode/{number}"), trace=str(path))

    kernel = {**x("gemm", 1.0, pid=0), "cat": "kernel"}
    _, report = merged(tmp_path, source(0, 1), source(1, 1, kernel), source(2, 0))
    assert ["no GPU kernel" in str(share.note) for share in report.sources] == [True, False, False]


def test_slices_of_one_thread_nest(tmp_path: Path) -> None:
    """Otherwise whoever reads the trace would cut them: two requests at once, each with work inside its hops."""
    listed = [
        each
        for way in range(4)
        for each in (
            hop(Kind.PREFILL, "waiting", 10 * way, 10 * way + 15, way=way),
            hop(Kind.PREFILL, "running", 10 * way + 15, 10 * way + 40, way=way),
            hop(Kind.PREFILL, "chunk", 10 * way + 16, 10 * way + 20, way=way, inner=True),
            hop(Kind.PREFILL, "chunk", 10 * way + 20, 10 * way + 40, way=way, inner=True),
        )
    ]
    listed.append(hop(Kind.PREFILL, "waiting", 90, None, way=9))
    source = TraceSource(rank=RankName("prefill/0"), hops=hops(tmp_path / "hops", *listed, left_out=3))
    found, report = merged(tmp_path, source)
    open_until: dict[int, list[float]] = {}
    for event in slices(found):
        stack = open_until.setdefault(event["tid"], [])
        while stack and stack[-1] <= event["ts"]:
            stack.pop()
        assert not stack or event["ts"] + event["dur"] <= stack[-1], event
        stack.append(event["ts"] + event["dur"])
    assert len(open_until) > 1
    (last,) = (event for event in slices(found) if "open" in event["args"])
    assert last["dur"] == 810_000, "to the end of the recording"
    assert report.sources[0].left_out == 3
    assert report.sources[0].note == "3 hops beyond what a rank keeps are left out"


def test_arrows_begin_and_end_inside_the_slices_they_join(tmp_path: Path) -> None:
    prefill = hops(tmp_path / "p", hop(Kind.PREFILL, "running", 10, 20), hop(Kind.PREFILL, "leaving", 20, 21))
    decode = hops(tmp_path / "d", hop(Kind.DECODE, "running", 20.5, 30))
    found, _ = merged(
        tmp_path,
        TraceSource(rank=RankName("prefill/0"), hops=prefill),
        TraceSource(rank=RankName("decode/0"), hops=decode),
    )
    by_name = {(event["pid"], event["name"]): event for event in slices(found)}
    (start,) = (event for event in found["traceEvents"] if event["ph"] == "s")
    (end,) = (event for event in found["traceEvents"] if event["ph"] == "f")
    source, target = by_name[1, "running"], by_name[2, "running"]
    assert source["ts"] <= start["ts"] < source["ts"] + source["dur"]
    assert (start["tid"], end["tid"]) == (source["tid"], target["tid"])
    assert target["ts"] == end["ts"]


def big_trace(path: Path, events: int) -> None:
    """A trace like a busy rank's."""
    with path.open("w") as file:
        file.write('{"baseTimeNanoseconds": 0, "traceEvents": [\n')
        for number in range(events):
            file.write(json.dumps(x(f"aten::some_operator_{number % 100}", number, 0.5)) + ",\n")
        file.write(json.dumps(x("last", events)) + "]}")


def peak_bytes(tmp_path: Path, events: int) -> int:
    """The most memory that the program takes for a trace of so many events."""
    trace = tmp_path / f"{events}.json"
    big_trace(trace, events)
    frame = MERGE_ORDER.encode(order(tmp_path, TraceSource(rank=RankName("decode/0"), trace=str(trace))))
    code = (
        "import resource, sys; from epdctl.telemetry.merge import main; status = main(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdin.write(len(frame).to_bytes(LENGTH, "big") + frame)
        program.stdin.flush()
        report = MERGE_REPORT.decode(program.stdout.read())
        peak = int(program.stderr.read()) * 1024
    assert program.returncode == 0
    assert report.sources[0].events == events + 1
    return peak


def test_the_program_s_memory_does_not_grow_with_its_input(tmp_path: Path) -> None:
    """The longer trace has 19 MB; as objects it would be 200."""
    assert peak_bytes(tmp_path, 150_000) - peak_bytes(tmp_path, 100) < 20 << 20


def test_the_program_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """A fifo that nobody writes to holds the merge up for ever; the end of its standard input ends it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    frame = MERGE_ORDER.encode(order(tmp_path, TraceSource(rank=RankName("decode/0"), trace=str(fifo))))
    process = subprocess.Popen([sys.executable, "-m", "epdctl.telemetry.merge"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(len(frame).to_bytes(LENGTH, "big") + frame)
    process.stdin.close()
    assert process.wait(60) == 1
