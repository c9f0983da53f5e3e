"""A rank without a model: a real process that speaks the lifecycle and misbehaves as its script says.

Run as ``python -m tests.support.scripted_rank``. The script is a JSON list in EPDCTL_SCRIPT: one entry an incarnation,
the last for all that follow.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from epdctl.ids import RequestId
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import (
    RANK_TO_SUPERVISOR,
    SPEC,
    SUPERVISOR_TO_RANK,
    CaptureWritten,
    ClockTold,
    Drain,
    Drained,
    Endpoints,
    Fatal,
    FatalKind,
    Heartbeat,
    Hello,
    Loading,
    PeersChanged,
    Prove,
    Proved,
    RankToSupervisor,
    Ready,
    StartCapture,
    StopCapture,
    SupervisorToRank,
    TellClock,
)
from epdctl.wire.message import PROTOCOL
from epdctl.wire.stream import Stream, connect
from epdctl.wire.trace import Hop, HopList, Kind

__all__ = ["Script", "facts_of"]

Line = Stream[SupervisorToRank, RankToSupervisor]


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one incarnation does. Unset: load, be ready, beat, drain at once, leave at SIGTERM."""

    facts: str = ""  # a file that gets a JSON line for each thing that others cannot see
    say: list[str] = []  # printed at the start
    grandchild: bool = False  # start a process in a session of its own, and leave it
    ignore_term: bool = False
    loading: tuple[int, int] | None = None  # report this much of the weights …
    hang_at_load: bool = False  # … and stay there
    exit_at_load: int | None = None
    kill_at_load: bool = False  # SIGKILL to itself
    fatal: str | None = None
    kind: FatalKind = FatalKind.CRASH
    restartable: bool = True
    wrong_token: bool = False
    bad_frames: int = 0
    endpoint_bytes: int = 0  # report an endpoint of this length
    exit_when_ready: int | None = None
    no_beats: bool = False
    unhealthy: str | None = None
    standstill: float = 0.0  # what every heartbeat says of the work under way, seconds
    unfit: str | None = None  # what it says when it is to prove itself …
    silent_proof: bool = False  # … or it says nothing …
    die_in_proof: bool = False
    deaf: bool = False  # read nothing after Hello
    drain_beats: int = 0  # heartbeats until Drained
    die_in_capture: bool = False
    capture_error: str | None = None
    capture_waits: bool = False  # write only when told to stop, steps or not
    clock_ahead_s: float = 0.0  # of everything that this process says or writes of time
    hop: tuple[Kind, str] | None = None  # what it notes of the one request there is …
    hop_at_s: float = 0.0  # … in true time, seconds after the start of the capture, for a tenth of one
    broken_trace: bool = False
    capture_idle: bool = False  # nothing ran, so there is no trace
    capture_fifo: bool = False  # the trace is a fifo without a writer


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    incarnation: int
    pid: int
    text: str = ""


def facts_of(path: Path) -> list[Fact]:
    return [msgspec.json.decode(line, type=Fact) for line in path.read_bytes().splitlines()] if path.exists() else []


class Actor:
    """One incarnation of a scripted rank."""

    def __init__(self, spec: RankSpec, script: Script, line: Line) -> None:
        self.spec = spec
        self.script = script
        self.line = line
        self.capture: StartCapture | None = None
        self.began = 0
        self.draining: int | None = None  # beats left until Drained

    async def play(self) -> None:
        script = self.script
        token = "0" * 64 if script.wrong_token else self.spec.token
        hello = Hello(
            run=self.spec.run,
            rank=self.spec.rank,
            incarnation=self.spec.incarnation,
            protocol=PROTOCOL,
            token=token,
            pid=os.getpid(),
        )
        await self.line.send(hello)
        for number in range(script.bad_frames):
            write_garbage(self.line, number)
        if not script.deaf:
            self.reading = asyncio.create_task(self.read())
        await self.load()
        http = "x" * script.endpoint_bytes or None
        await self.line.send(Ready(endpoints=Endpoints(inbox=self.spec.endpoint("inbox"), http=http)))
        if script.exit_when_ready is not None:
            os._exit(script.exit_when_ready)
        await self.beat()

    async def load(self) -> None:
        script = self.script
        if script.loading is not None:
            await self.line.send(Loading(phase="weights", done=script.loading[0], total=script.loading[1]))
        if script.fatal is not None:
            await self.line.send(Fatal(kind=script.kind, text=script.fatal, restartable=script.restartable))
            sys.exit(1)
        if script.exit_at_load is not None:
            sys.exit(script.exit_at_load)
        if script.kill_at_load:
            os.kill(os.getpid(), signal.SIGKILL)
        if script.hang_at_load:
            await asyncio.Event().wait()

    async def beat(self) -> None:
        completed = 0
        while not self.script.no_beats:
            completed += 1
            beat = Heartbeat(
                inflight=1,
                completed=completed,
                unhealthy=self.script.unhealthy,
                standstill_s=self.script.standstill,
            )
            await self.line.send(beat)
            if self.draining is not None:
                self.draining -= 1
                if self.draining < 0:
                    self.draining = None
                    self.fact("drained")
                    await self.line.send(Drained())
            await asyncio.sleep(self.spec.config.heartbeat_seconds)
        await asyncio.Event().wait()

    async def read(self) -> None:
        while (message := await self.line.receive()) is not None:
            await self.obey(message)
        os._exit(0)

    async def obey(self, message: SupervisorToRank) -> None:
        match message:
            case Drain():
                self.fact("drain")
                self.draining = self.script.drain_beats
            case PeersChanged(version=version, peers=peers):
                self.fact("peers", f"{version}:{','.join(peer.rank for peer in peers)}")
            case StartCapture():
                await self.start_capture(message)
            case StopCapture():
                await self.write_capture()
            case Prove(number=number):
                await self.prove(number)
            case TellClock(asked=asked):
                now = self.clock()
                await self.line.send(ClockTold(asked=asked, heard=now, told=now))

    async def prove(self, number: int) -> None:
        self.fact("prove")
        if self.script.die_in_proof:
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.script.silent_proof:
            await self.line.send(Proved(number=number, fault=self.script.unfit))

    async def start_capture(self, message: StartCapture) -> None:
        if self.script.die_in_capture:
            os.kill(os.getpid(), signal.SIGKILL)
        self.capture, self.began = message, self.clock()
        if message.steps is not None and not self.script.capture_waits:
            await self.write_capture()

    async def write_capture(self) -> None:
        if self.capture is None:
            return
        capture, error = self.capture, self.script.capture_error
        self.capture = None
        note = "nothing ran" if self.script.capture_idle else None
        written = CaptureWritten(capture=capture.capture, error=error, note=note)
        if error is None and note is None:
            written = CaptureWritten(capture=capture.capture, path=capture.path, hops=self.write_files(capture))
        await self.line.send(written)

    def clock(self) -> int:
        return time.time_ns() + round(self.script.clock_ahead_s * 1e9)

    def write_files(self, capture: StartCapture) -> str | None:
        """A trace with one event, over the hop where there is one; returns where the hops are."""
        began = self.began + round(self.script.hop_at_s * 1e9)
        if capture.path is not None and self.script.capture_fifo:
            os.mkfifo(capture.path)
        elif capture.path is not None:
            write_trace(Path(capture.path), began, broken=self.script.broken_trace)
        if capture.hops is None or self.script.hop is None:
            return None
        kind, name = self.script.hop
        hop = Hop(kind=kind, request=RequestId("r1"), attempt=1, way=1, name=name, began=began, ended=began + 10**8)
        Path(capture.hops).write_bytes(msgspec.json.encode(HopList(until=hop.ended or 0, hops=[hop])))
        return capture.hops

    def fact(self, name: str, text: str = "") -> None:
        record(self.script, self.spec, name, text)


def record(script: Script, spec: RankSpec, name: str, text: str = "", pid: int | None = None) -> None:
    if script.facts:
        fact = Fact(name=name, incarnation=spec.incarnation, pid=pid or os.getpid(), text=text)
        with open(script.facts, "ab", buffering=0) as file:
            file.write(msgspec.json.encode(fact) + b"\n")


def write_garbage(line: Line, number: int) -> None:
    body = b"\xc1 not msgpack" if number % 2 else b"\x81\xa1t\xa7Unknown"
    line._writer.write(len(body).to_bytes(4, "big") + body)  # no message makes a frame that is none


def write_trace(path: Path, began: int, *, broken: bool) -> None:
    """As torch's profiler does, from the same pid and tid on every rank."""
    base = began - 123_456_000
    event = {"ph": "X", "name": "step", "pid": 7, "tid": 7, "ts": 123_456.0, "dur": 100_000.0, "args": {}}
    text = json.dumps({"baseTimeNanoseconds": base, "traceEvents": [event, event]})
    path.write_text(text[: -len(text) // 4] if broken else text)


def prepare(script: Script, spec: RankSpec) -> None:
    for text in script.say:
        print(text, flush=True)
    if script.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if script.grandchild:
        child = subprocess.Popen(["sleep", "3600"], start_new_session=True, stdin=subprocess.DEVNULL)
        record(script, spec, "grandchild", pid=child.pid)
    record(script, spec, "started")


async def run(spec: RankSpec, script: Script) -> None:
    line = await connect(spec.supervisor, SUPERVISOR_TO_RANK, RANK_TO_SUPERVISOR)
    await Actor(spec, script, line).play()


def main() -> None:
    spec = SPEC.decode(sys.stdin.buffer.read())
    scripts = msgspec.json.decode(os.environ["EPDCTL_SCRIPT"], type=list[Script])
    script = scripts[min(spec.incarnation, len(scripts)) - 1]
    prepare(script, spec)
    asyncio.run(run(spec, script))


if __name__ == "__main__":
    main()
