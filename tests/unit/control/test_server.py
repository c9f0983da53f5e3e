"""The control socket between a client and a daemon that is only a backend."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import get_args

import pytest

from epdctl.control.backend import replies_of
from epdctl.control.client import Client, refused_error
from epdctl.control.server import ControlServer, refusal
from epdctl.errors import (
    AlreadyRunning,
    DeadlineExceeded,
    EpdError,
    NotRunning,
    PeerGone,
    SelectorError,
    TopologyError,
    Unreachable,
    UserError,
)
from epdctl.ids import Incarnation, RankName, RunId
from epdctl.wire.control import (
    COMMAND,
    REPLY,
    Accepted,
    CaptureReply,
    Command,
    Down,
    Event,
    FollowLogs,
    GetEvents,
    GetHealth,
    GetStatus,
    HealthReply,
    LogLine,
    Refused,
    Restart,
    StartCaptures,
    StatusReply,
    StopCaptures,
    Watch,
    reply_of,
)
from epdctl.wire.stream import connect

STATUS = StatusReply(schema=1, cluster="c", run=RunId("r"), gateway=None, ranks=[])
RANK = RankName("decode/0")


class Backend:
    """Says what it is told to; ``left`` is set when a stream's reader went away."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.asked: list[object] = []
        self.late = False

    async def status(self, command: GetStatus) -> StatusReply:
        return STATUS

    async def watch(self, command: Watch) -> AsyncGenerator[StatusReply, None]:
        try:
            yield STATUS
            await asyncio.Event().wait()
        finally:
            self.left.set()

    async def health(self, command: GetHealth) -> HealthReply:
        if self.late:
            raise DeadlineExceeded("prefill/0 said nothing within 5 s")
        raise RuntimeError("a bug")

    async def restart(self, command: Restart) -> Accepted:
        raise SelectorError("no such rank", hint="did you mean decode/0?")

    async def down(self, command: Down) -> AsyncGenerator[Event, None]:
        self.asked.append(command)
        yield Event(at=0.0, wall=0.0, kind="down")

    async def logs(self, command: FollowLogs) -> AsyncGenerator[LogLine, None]:
        self.asked.append(command)
        for number in range(1000):
            yield LogLine(rank=RANK, incarnation=Incarnation(1), text=str(number))

    async def events(self, command: GetEvents) -> AsyncGenerator[Event, None]:
        try:
            while True:  # more than any socket holds
                yield Event(at=0.0, wall=0.0, kind="x", text="y" * 65_536)
        finally:
            self.left.set()

    async def start_captures(self, command: StartCaptures) -> CaptureReply:
        return CaptureReply(capture="1", results=[])

    async def stop_captures(self, command: StopCaptures) -> CaptureReply:
        return CaptureReply(capture="1", results=[])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Backend, Client]]:
    """A server on a thread of its own, as the client is synchronous."""
    backend, path = Backend(), tmp_path / "control.sock"
    loop, up = asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        server = ControlServer(backend)
        await server.start(path)
        up.set()
        await stop.wait()
        await server.close(5.0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert up.wait(60)
    yield backend, Client(path)
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    loop.close()


def test_one_command_has_one_answer(served: tuple[Backend, Client]) -> None:
    _, client = served
    assert client.status() == STATUS
    assert client.start_captures().capture == client.stop_captures().capture == "1"


def test_a_stream_ends_with_done(served: tuple[Backend, Client]) -> None:
    backend, client = served
    assert [line.text for line in client.logs(FollowLogs(tail=3))] == [str(number) for number in range(1000)]
    assert [event.kind for event in client.down(drain_s=1.5, force=True)] == ["down"]
    assert backend.asked == [FollowLogs(tail=3), Down(drain_s=1.5, force=True)]


def test_an_error_arrives_as_itself_with_its_hint(served: tuple[Backend, Client]) -> None:
    _, client = served
    with pytest.raises(SelectorError, match="no such rank") as refused:
        client.restart(["x"])
    assert (refused.value.exit_status, refused.value.hint) == (2, "did you mean decode/0?")


def test_time_that_ended_inside_the_daemon_arrives_as_such(served: tuple[Backend, Client]) -> None:
    backend, client = served
    backend.late = True
    with pytest.raises(DeadlineExceeded, match="prefill/0 said nothing") as refused:
        client.health()
    assert refused.value.exit_status == 5


@pytest.mark.parametrize(
    ("refused", "kind"),
    [
        (refusal(AlreadyRunning("it is up")), AlreadyRunning),
        (refusal(TopologyError([])), UserError),  # not told as it was made: its mistakes are in the text
        (refusal(PeerGone("it left")), EpdError),
        (Refused(text="said by an older daemon", exit_status=3), NotRunning),
        (Refused(text="said by a newer daemon", exit_status=5, kind="TooSlow"), DeadlineExceeded),
    ],
)
def test_what_a_refusal_is_raised_as(refused: Refused, kind: type[EpdError]) -> None:
    error = refused_error(refused)
    assert type(error) is kind
    assert error.message == refused.text


def test_a_bug_in_the_daemon_is_told_as_our_fault_and_the_daemon_goes_on(served: tuple[Backend, Client]) -> None:
    _, client = served
    with pytest.raises(EpdError, match="a bug") as refused:
        client.health()
    assert refused.value.exit_status == 70
    assert client.status() == STATUS


def test_a_stream_stops_when_its_reader_hangs_up(served: tuple[Backend, Client]) -> None:
    backend, client = served
    with contextlib.closing(client.watch()) as statuses:
        assert next(statuses) == STATUS
    assert backend.left.wait(60)


def test_a_client_that_does_not_read_is_dropped(
    served: tuple[Backend, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, client = served
    monkeypatch.setattr("epdctl.control.server.READ_SECONDS", 0.05)

    async def ask_and_never_read() -> None:
        stream = await connect(client.path, REPLY, COMMAND)
        await stream.send(GetEvents(follow=True))
        assert await asyncio.to_thread(backend.left.wait, 60)
        stream.abort()
        await stream.close()

    asyncio.run(ask_and_never_read())
    assert client.status() == STATUS


def test_a_command_that_is_none_is_refused(served: tuple[Backend, Client]) -> None:
    _, client = served

    async def ask() -> object:
        stream = await connect(client.path, REPLY, REPLY)
        await stream.send(STATUS)
        answer = await stream.receive()
        await stream.close()
        return answer

    answer = asyncio.run(ask())
    assert isinstance(answer, Refused)
    assert "different versions" in (answer.hint or "")


def test_nobody_there_is_not_running_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotRunning) as refused:
        Client(tmp_path / "control.sock").status()
    assert "epdctl up" in (refused.value.hint or "")


def test_somebody_who_does_not_answer_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("epdctl.control.client.ANSWER_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        with pytest.raises(Unreachable, match=r"has not answered for 0\.05 s"):
            Client(tmp_path / "control.sock").status()


def test_a_daemon_that_breaks_off_is_unreachable(served: tuple[Backend, Client], tmp_path: Path) -> None:
    async def hang_up() -> None:
        ended = asyncio.Event()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(4)
            writer.close()
            ended.set()

        server = await asyncio.start_unix_server(accept, tmp_path / "other.sock")
        with pytest.raises(Unreachable):
            await asyncio.to_thread(Client(tmp_path / "other.sock").status)
        await ended.wait()
        server.close()

    asyncio.run(hang_up())


def test_every_command_has_a_handler_and_says_what_answers_it() -> None:
    table = replies_of(Backend())
    assert set(table) == set(get_args(Command))
    assert reply_of(GetStatus()) is StatusReply
    assert reply_of(Down()) is Event
