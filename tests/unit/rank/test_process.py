"""``python -m epdctl.rank`` as real processes, each with a service that does what its model's name says."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from epdctl.ids import Modality, RequestId
from epdctl.rank.fatal import Departure
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ROUTER_TO_CLIENT,
    ClientToRouter,
    Encode,
    Encoded,
    MediaItem,
    RouterToClient,
)
from epdctl.wire.lifecycle import (
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
    Ready,
    StartCapture,
    StopCapture,
    TellClock,
    Unfit,
)
from epdctl.wire.message import PROTOCOL
from epdctl.wire.sockets import Link
from epdctl.wire.trace import HOP_LIST
from epdctl.wire.transfer import PoolAddress, RemoteLease
from tests.support.fake_supervisor import Child, Supervisor, launch, supervising
from tests.support.ranks import Facts, make_peer, run


def supervised(sockets: Path, test: Callable[[Supervisor], Coroutine[Any, Any, None]]) -> None:
    async def work() -> None:
        async with supervising(sockets) as supervisor:
            await test(supervisor)

    run(work())


def test_a_rank_says_hello_loads_is_ready_beats_and_leaves_when_told(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0")
        await child.hears(Heartbeat, lambda beat: beat.total_pages == 4)
        hello, *rest = [message for message in child.said.seen if not isinstance(message, Heartbeat)]
        spec = child.spec
        assert hello == Hello(
            run=spec.run,
            rank=spec.rank,
            incarnation=spec.incarnation,
            protocol=PROTOCOL,
            token=spec.token,
            pid=child.process.pid,
        )
        assert [message.phase for message in rest[:-1]] == ["imports", "imports", "weights", "weights"]
        assert rest[-2] == Loading(phase="weights", done=2, total=2)
        assert rest[-1] == Ready(endpoints=Endpoints(inbox="ipc:///somewhere"))
        child.process.terminate()
        assert await child.ended() == Departure.ASKED

    supervised(sockets, test)


def test_a_rank_that_does_not_fit_the_others_says_why_and_asks_for_no_restart(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0")
        await child.hears(Ready)
        await child.tell(Unfit(text="width is 8 here and 9 there"))
        (last,) = await child.hears(Fatal)
        assert last == Fatal(kind=FatalKind.INCOMPATIBLE, text="width is 8 here and 9 there", restartable=False)
        assert await child.ended() == Departure.INCOMPATIBLE

    supervised(sockets, test)


def test_peers_before_ready_are_kept_and_older_versions_dropped(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0")
        await child.hears(Hello)
        await child.tell(PeersChanged(version=7, peers=[make_peer("prefill/0", incarnation=2)]))
        await child.tell(PeersChanged(version=6, peers=[]))
        await child.hears(Heartbeat, lambda beat: beat.unhealthy == "prefill/0#2")
        await child.tell(PeersChanged(version=7, peers=[]))
        await child.tell(PeersChanged(version=8, peers=[make_peer("prefill/1"), make_peer("gateway/0")]))
        (beat,) = await child.hears(Heartbeat, lambda beat: beat.unhealthy == "prefill/1#1,gateway/0#1")
        assert beat.completed == 2

    supervised(sockets, test)


def test_draining_and_captures(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0")
        await child.hears(Hello)
        await child.hears(Ready)
        await child.tell(StartCapture(capture="a", path="/t/a", steps=2))
        await child.tell(StartCapture(capture="b", path="/t/b", steps=0))
        await child.hears(CaptureWritten, number=2)
        await child.tell(StartCapture(capture="c", path="/t/c"))
        await child.tell(StopCapture(capture="c"))
        said = {(m.capture, m.path, m.error) for m in await child.hears(CaptureWritten, number=3)}
        assert said == {("a", "/t/a", None), ("b", None, "no steps"), ("c", "/t/c", None)}
        await child.tell(Drain(budget_s=60))
        await child.hears(Drained)

    supervised(sockets, test)


def test_the_end_of_work_is_told_at_once(sockets: Path) -> None:
    """The next beat is due in an hour; until then ``status`` would show a request that was answered."""

    async def test(supervisor: Supervisor) -> None:
        service = "tests.support.fake_services:BusyOnce"
        child = await supervisor.start("decode/0", service=service, heartbeat_seconds=3600.0)
        await child.hears(Heartbeat, lambda beat: beat.inflight == 1)
        await child.peers(make_peer("gateway/0"))
        beats = await child.hears(Heartbeat, number=3)
        assert [beat.inflight for beat in beats] == [0, 1, 0]

    supervised(sockets, test)


def test_a_capture_s_hops_are_a_file_and_a_rank_tells_its_clock(sockets: Path, tmp_path: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("gateway/0")
        await child.hears(Hello)
        await child.tell(TellClock(asked=17))
        await child.hears(Ready)
        before = time.time_ns()
        await child.tell(TellClock(asked=18))
        first, second = await child.hears(ClockTold, number=2)
        assert (first.asked, second.asked) == (17, 18)
        assert before <= second.heard <= second.told <= time.time_ns()
        path = tmp_path / "folder" / "hops.json"
        await child.tell(StartCapture(capture="a", hops=str(path)))
        await child.tell(StopCapture(capture="a"))
        await child.tell(StopCapture(capture="a"))
        (written,) = await child.hears(CaptureWritten)
        assert (written.path, written.hops, written.error) == (None, str(path), None)
        assert HOP_LIST.decode(path.read_bytes()).hops == []
        path.parent.joinpath("file").touch()
        await child.tell(StartCapture(capture="b", hops=str(path.parent / "file" / "hops.json")))
        await child.tell(StopCapture(capture="b"))
        (_, failed) = await child.hears(CaptureWritten, number=2)
        assert "its hops were not written" in str(failed.error)

    supervised(sockets, test)


def test_a_rank_that_is_still_loading_drains_at_once_and_captures_nothing(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0", "hang")
        await child.hears(Loading, lambda message: message.phase == "weights")
        await child.tell(StartCapture(capture="a", path="/t/a", steps=2))
        (answer,) = await child.hears(CaptureWritten)
        assert answer.error == "decode/0 is still loading"
        await child.hears(Heartbeat, lambda beat: beat == Heartbeat(), number=3)
        await child.tell(Drain(budget_s=60))
        await child.hears(Drained)

    supervised(sockets, test)


def test_a_drain_ends_at_its_deadline_without_pretending(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0", "never-idle")
        await child.hears(Ready)
        await child.tell(Drain(budget_s=0.01))
        beats = sum(isinstance(message, Heartbeat) for message in child.said.seen)
        await child.hears(Heartbeat, number=beats + 3)
        child.process.terminate()
        assert await child.ended() == Departure.ASKED
        assert not any(isinstance(message, Drained) for message in child.said.seen)

    supervised(sockets, test)


@pytest.mark.parametrize("behaviour", ["", "hang", "hang-in-thread", "never-closes"])
def test_sigterm_ends_a_rank_whatever_it_does_and_sigint_does_not(sockets: Path, behaviour: str) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0", behaviour)
        await child.hears(Loading, lambda message: message.phase == "weights")
        child.process.send_signal(signal.SIGINT)
        beats = sum(isinstance(message, Heartbeat) for message in child.said.seen)
        await child.hears(Heartbeat, number=beats + 2)
        child.process.terminate()
        assert await child.ended() == Departure.ASKED

    supervised(sockets, test)


def test_a_rank_leaves_when_it_loses_its_supervisor(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0", "hang")
        await child.hears(Heartbeat)
        assert child.stream is not None
        await child.stream.close()
        assert await child.ended() == Departure.ORPHANED

    supervised(sockets, test)


def test_a_frame_that_is_not_a_message_does_not_end_a_rank(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0")
        await child.hears(Ready)
        assert child.stream is not None
        child.stream._writer.write(b"\x00\x00\x00\x03bad")
        await child.tell(Drain(budget_s=60))
        await child.hears(Drained)

    supervised(sockets, test)


async def last_words(child: Child) -> Fatal:
    (fatal,) = await child.hears(Fatal)
    assert isinstance(fatal, Fatal)
    return fatal


@pytest.mark.parametrize(
    ("behaviour", "kind", "restartable", "text"),
    [
        ("bad-checkpoint", FatalKind.CHECKPOINT, False, "no key visual.blocks.0 (is it the whole checkpoint?)"),
        ("no-memory", FatalKind.MEMORY, False, "MemoryError: at load"),
        ("no-gpu-memory", FatalKind.MEMORY, False, "OutOfMemoryError: CUDA out of memory"),
        ("port-taken", FatalKind.PORT, True, "address in use"),
        ("incompatible", FatalKind.INCOMPATIBLE, False, "transformers 5.17 here, 5.23 there"),
        ("bug", FatalKind.CRASH, True, "ZeroDivisionError: at load"),
    ],
)
def test_what_goes_wrong_at_load_is_said_in_its_kind(
    sockets: Path, behaviour: str, kind: FatalKind, restartable: bool, text: str
) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0", behaviour)
        fatal = await last_words(child)
        assert (fatal.kind, fatal.restartable) == (kind, restartable)
        assert text in fatal.text
        assert await child.ended() == Departure[kind.name]
        told_in_words = kind in (FatalKind.CHECKPOINT, FatalKind.INCOMPATIBLE)
        assert ("Traceback" in await child.errors()) is not told_in_words

    supervised(sockets, test)


@pytest.mark.parametrize("service", ["tests.support.nowhere:Service", "tests.support.fake_services:Missing", "", "a"])
def test_a_service_that_is_not_there_is_a_mistake_in_the_config(sockets: Path, service: str) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0", service=service)
        fatal = await last_words(child)
        assert (fatal.kind, fatal.restartable) == (FatalKind.CONFIG, False)
        assert f"the service {service!r} cannot be imported" in fatal.text
        assert await child.ended() == Departure.CONFIG

    supervised(sockets, test)


@pytest.mark.parametrize(
    ("peer", "kind", "text"),
    [
        ("gateway/1", FatalKind.CRASH, "ZeroDivisionError: in a callback"),
        ("gateway/2", FatalKind.CRASH, "ZeroDivisionError: in a task"),
        ("gateway/3", FatalKind.CRASH, "ZeroDivisionError: on the compute thread"),
        ("gateway/4", FatalKind.MEMORY, "MemoryError: while serving"),
    ],
)
def test_an_error_nobody_handled_is_never_silent(sockets: Path, peer: str, kind: FatalKind, text: str) -> None:
    async def test(supervisor: Supervisor) -> None:
        child = await supervisor.start("decode/0")
        await child.hears(Ready)
        await child.peers(make_peer(peer))
        assert await last_words(child) == Fatal(kind=kind, text=text, restartable=True)
        assert await child.ended() == Departure[kind.name]
        told_in_words = kind in (FatalKind.CHECKPOINT, FatalKind.INCOMPATIBLE)
        assert ("Traceback" in await child.errors()) is not told_in_words

    supervised(sockets, test)


def test_without_a_supervisor_or_a_description_there_is_no_rank(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        nobody = Supervisor(sockets / "elsewhere")
        child = await nobody.start("decode/0")
        assert await child.ended() == Departure.ORPHANED
        assert "no supervisor at" in await child.errors()
        process = await launch(b"nonsense")
        _, errors = await process.communicate()
        assert process.returncode == Departure.CONFIG
        assert b"no rank was described" in errors

    supervised(sockets, test)


def job(index: int) -> Encode:
    address = PoolAddress(
        owner=make_peer("prefill/0").rank,
        incarnation=make_peer("prefill/0").incarnation,
        pool="embeddings",
        backend="zmq",
        endpoint="ipc:///nowhere",
    )
    return Encode(
        request=RequestId("r"),
        attempt=1,
        item=MediaItem(index=index, modality=Modality.IMAGE, content_hash="", of=2, grid=[1, 2, 2], rows=1),
        slot=RemoteLease(pool=address, lease=1, generation=1, extents=[]),
        notify="ipc:///nowhere",
        budget_s=600,
    )


def test_a_router_gives_the_items_of_a_killed_encoder_to_the_other(sockets: Path) -> None:
    async def test(supervisor: Supervisor) -> None:
        router = await supervisor.start("encoder-router/0", service="epdctl.encoder.router:RouterService")
        encoders = [
            await supervisor.start(f"encoder/{number}", behaviour, service="tests.support.fake_services:FakeEncoder")
            for number, behaviour in enumerate(["holds", "answers"])
        ]
        ready = [(await child.hears(Ready))[0].endpoints for child in (router, *encoders)]
        peers = [make_peer(f"encoder/{number}", endpoints) for number, endpoints in enumerate(ready[1:])]
        await router.peers(*peers)
        answers = Facts()
        assert ready[0].inbox is not None
        gateway: Link[RouterToClient, ClientToRouter] = Link(
            ready[0].inbox, ROUTER_TO_CLIENT, CLIENT_TO_ROUTER, lambda message, _: answers.add(message)
        )
        for index in range(2):
            gateway.send(job(index), [bytes(100_000)])
        await answers.count(1)
        await encoders[0].hears(Heartbeat, lambda beat: beat.inflight == 1)
        encoders[0].process.kill()
        assert await encoders[0].ended() == -signal.SIGKILL
        await router.peers(peers[1])
        told = await answers.count(2)
        assert [(type(message), message.by) for message in told] == [(Encoded, "encoder/1")] * 2
        assert {message.index for message in told} == {0, 1}
        gateway.close()

    supervised(sockets, test)
