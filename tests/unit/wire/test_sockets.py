"""Inbox and Link over real ZMQ sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import stat
from pathlib import Path

import msgspec
import pytest
import zmq

from epdctl.errors import BadMessage, PeerGone
from epdctl.wire import sockets as wire
from epdctl.wire.message import Codec, Message
from epdctl.wire.sockets import Inbox, Link
from tests.support.ranks import Facts, run


class Ping(Message, frozen=True):
    number: int


class Pong(Message, frozen=True):
    number: int


PING: Codec[Ping] = Codec(Ping)
PONG: Codec[Pong] = Codec(Pong)


class Bench:
    """An inbox that notes what arrives."""

    def __init__(self, sockets: Path, name: str = "inbox") -> None:
        self.endpoint = f"ipc://{sockets}/{name}"
        self.got = Facts()
        self.inbox: Inbox[Ping] = Inbox(
            self.endpoint, PING, lambda sender, message, frames: self.got.add((sender, message.number, frames))
        )
        self.answers = Facts()

    def link(self) -> Link[Pong, Ping]:
        return Link(self.endpoint, PONG, PING, lambda message, frames: self.answers.add((message.number, frames)))


def test_messages_and_frames_both_ways_in_order(sockets: Path) -> None:
    async def work() -> None:
        bench = Bench(sockets)
        link = bench.link()
        large = bytes(range(256)) * 4096  # 1 MiB: travels without a copy
        for number in range(300):  # more than one burst
            link.send(Ping(number=number), [b"small", large] if number == 7 else [])
        got = await bench.got.count(300)
        assert [number for _, number, _ in got] == list(range(300))
        assert [bytes(frame) for frame in got[7][2]] == [b"small", large]
        sender = got[0][0]
        bench.inbox.reply(sender, Pong(number=9), PONG, [large])
        ((number, frames),) = await bench.answers.count(1)
        assert (number, bytes(frames[0])) == (9, large)
        link.close()
        bench.inbox.close()

    run(work())


def test_a_link_may_have_a_larger_send_buffer(sockets: Path) -> None:
    wanted = 600_000  # the kernel doubles it

    async def work() -> None:
        bench = Bench(sockets)
        assert wanted * 2 not in _send_buffers()
        link: Link[Pong, Ping] = Link(bench.endpoint, PONG, PING, lambda _, __: None, send_buffer=wanted)
        for number in itertools.count(1):  # each turn lets the loop see that the connection stands
            link.send(Ping(number=number), [bytes(1 << 20)])
            await bench.got.count(number)
            if wanted * 2 in _send_buffers():
                break
        link.close()
        bench.inbox.close()

    run(work())


def _send_buffers() -> set[int]:
    """Of this process's unix sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as each:
                    found.add(each.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
    return found


def test_a_link_that_opens_before_its_inbox_delivers_once_it_is_there(sockets: Path) -> None:
    async def work() -> None:
        link: Link[Pong, Ping] = Link(f"ipc://{sockets}/inbox", PONG, PING, lambda _, __: None)
        link.send(Ping(number=1))
        bench = Bench(sockets)
        await bench.got.count(1)
        link.close()
        bench.inbox.close()

    run(work())


def test_bad_frames_are_counted_and_the_next_message_arrives(sockets: Path) -> None:
    async def work() -> None:
        bench = Bench(sockets)
        stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(bench.endpoint)
        stranger.send(b"\xc1")
        stranger.send(msgspec.msgpack.encode({"t": "Pong", "number": 1}))
        stranger.send(b"")
        stranger.send(b"x" * (PING.limit + 1))
        stranger.send(PING.encode(Ping(number=4)))
        await bench.got.count(1)
        assert bench.inbox.bad_frames == 4
        assert [number for _, number, _ in bench.got.seen] == [4]
        stranger.close()
        bench.inbox.close()

    run(work())


def test_a_bad_answer_is_counted_by_the_link(sockets: Path) -> None:
    async def work() -> None:
        bench = Bench(sockets)
        link = bench.link()
        link.send(Ping(number=1))
        await bench.got.count(1)
        sender = bench.got.seen[0][0]
        bench.inbox.reply(sender, Ping(number=1), PING)  # not what this link expects
        bench.inbox.reply(sender, Pong(number=2), PONG)
        await bench.answers.count(1)
        assert link.bad_frames == 1
        assert [number for number, _ in bench.answers.seen] == [2]
        link.close()
        bench.inbox.close()

    run(work())


def test_a_frame_above_the_limit_is_refused_where_it_is_sent_and_both_ends_go_on(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cost the whole connection, for ever, and neither end was told."""
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1 << 20)

    async def work() -> None:
        bench = Bench(sockets)
        link = bench.link()
        with pytest.raises(BadMessage, match="a frame of 2097152 bytes; the limit is 1048576"):
            link.send(Ping(number=1), [b"small", bytes(2 << 20)])
        link.send(Ping(number=2), [bytes(1 << 20)])
        ((sender, number, _),) = await bench.got.count(1)
        assert number == 2
        with pytest.raises(BadMessage):
            bench.inbox.reply(sender, Pong(number=1), PONG, [bytes(2 << 20)])
        bench.inbox.reply(sender, Pong(number=2), PONG, [bytes(1 << 20)])
        assert [number for number, _ in await bench.answers.count(1)] == [2]
        link.close()
        bench.inbox.close()

    run(work())


def test_a_stranger_with_a_frame_above_the_limit_costs_nobody_else_anything(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1 << 20)

    async def work() -> None:
        bench = Bench(sockets)
        stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(bench.endpoint)
        stranger.send_multipart([PING.encode(Ping(number=1)), bytes(2 << 20)])
        link = bench.link()
        link.send(Ping(number=2))
        await bench.got.count(1)
        assert [number for _, number, _ in bench.got.seen] == [2]
        for each in (stranger, link, bench.inbox):
            each.close()

    run(work())


class Rude:
    """A peer that answers with a frame beyond every limit, until it is told to behave."""

    def __init__(self, sockets: Path) -> None:
        self.endpoint = f"ipc://{sockets}/rude"
        self.heard = 0
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(self.endpoint)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket.fileno(), self._answer)

    def _answer(self) -> None:
        while int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            sender = self.socket.recv_multipart()[0]
            self.heard += 1
            self.socket.send_multipart([sender, PONG.encode(Pong(number=self.heard))])
            if self.heard == 1:
                self.socket.send_multipart([sender, PONG.encode(Pong(number=0)), bytes(2 << 20)])

    def close(self) -> None:
        self._loop.remove_reader(self.socket.fileno())
        self.socket.close()


def test_a_connection_that_zmq_gave_up_is_noticed_and_made_anew(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1 << 20)

    async def work() -> None:
        rude, answers, stands = Rude(sockets), Facts(), Facts()
        link: Link[Pong, Ping] = Link(rude.endpoint, PONG, PING, lambda message, _: answers.add(message.number))
        link.watch(stands.add)
        link.send(Ping(number=1))
        await stands.until(lambda seen: False in seen)
        assert answers.seen == [1], "what came before it is not lost"
        link.send(Ping(number=2))
        assert await answers.count(2) == [1, 2]
        assert stands.seen[-2:] == [False, True]
        link.close()
        rude.close()

    run(work())


def test_a_link_may_be_closed_when_it_breaks_or_before_it_is_made_anew(sockets: Path) -> None:
    async def work() -> None:
        broken = Facts()
        bench = Bench(sockets)
        first, second = bench.link(), bench.link()

        def tell(stands: bool, closing: Link[Pong, Ping] | None = None) -> None:
            if not stands:
                broken.add(1)
                if closing is not None:
                    closing.close()

        first.watch(lambda stands: tell(stands, first))
        second.watch(tell)
        for link in (first, second):
            link.send(Ping(number=1))
        await bench.got.count(2)
        bench.inbox.close()
        await broken.count(2)
        second.send(Ping(number=2))
        second.close()
        for link in (first, second):
            with pytest.raises(PeerGone, match="withdrawn"):
                link.send(Ping(number=3))

    run(work())


def test_a_closed_link_raises_and_drops_what_it_held(sockets: Path) -> None:
    async def work() -> None:
        link: Link[Pong, Ping] = Link(f"ipc://{sockets}/inbox", PONG, PING, lambda _, __: None)
        link.send(Ping(number=1))
        link.close()
        link.close()
        with pytest.raises(PeerGone, match="withdrawn"):
            link.send(Ping(number=2))
        bench = Bench(sockets)  # a later incarnation, at the very same path
        fresh = bench.link()
        fresh.send(Ping(number=3))
        await bench.got.count(1)
        assert [number for _, number, _ in bench.got.seen] == [3]
        fresh.close()
        bench.inbox.close()

    run(work())


def test_what_was_under_way_to_a_dead_inbox_does_not_reach_the_next_one(sockets: Path) -> None:
    async def work() -> None:
        first, second = Bench(sockets, "r.1"), Bench(sockets, "r.2")
        link = first.link()
        link.send(Ping(number=1))
        await first.got.count(1)
        first.inbox.close()
        for number in range(50):
            link.send(Ping(number=number))
        link.close()
        fresh = second.link()
        fresh.send(Ping(number=100))
        await second.got.count(1)
        assert [number for _, number, _ in second.got.seen] == [100]
        fresh.close()
        second.inbox.close()

    run(work())


def test_an_outbox_is_bounded(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HIGH_WATER", 8)

    async def work() -> None:
        link: Link[Pong, Ping] = Link(f"ipc://{sockets}/nobody", PONG, PING, lambda _, __: None)
        for number in range(8):
            link.send(Ping(number=number))
        with pytest.raises(PeerGone, match="does not read"):
            link.send(Ping(number=8))
        link.close()

    run(work())


def test_a_reply_to_a_peer_that_left_is_peer_gone(sockets: Path) -> None:
    async def work() -> None:
        bench = Bench(sockets)
        leaving, staying = bench.link(), bench.link()
        leaving.send(Ping(number=1))
        await bench.got.count(1)
        gone = bench.got.seen[0][0]
        leaving.close()

        async def answer_until_refused() -> None:  # each turn of the inbox is a message from the one that stays
            for number in range(2, 10_000):
                staying.send(Ping(number=number))
                await bench.got.count(number)
                bench.inbox.reply(gone, Pong(number=0), PONG)

        with pytest.raises(PeerGone):
            await answer_until_refused()
        with pytest.raises(PeerGone):
            bench.inbox.reply(b"never was", Pong(number=0), PONG)
        bench.inbox.close()
        with pytest.raises(PeerGone, match="closed"):
            bench.inbox.reply(gone, Pong(number=0), PONG)
        staying.close()

    run(work())


def test_an_inbox_is_for_its_owner_only_and_a_place_that_cannot_be_is_an_oserror(sockets: Path) -> None:
    async def work() -> None:
        bench = Bench(sockets)
        assert stat.S_IMODE((sockets / "inbox").stat().st_mode) == 0o600
        bench.inbox.close()
        with pytest.raises(OSError, match="cannot listen at ipc:///nowhere/at/all"):
            Inbox("ipc:///nowhere/at/all", PING, lambda _, __, ___: None)
        with pytest.raises(OSError, match="cannot listen"):
            Inbox(f"ipc://{sockets}/{'x' * 200}", PING, lambda _, __, ___: None)

    run(work())


@pytest.mark.parametrize("endpoint", ["", "nonsense", "ipc://" + "x" * 200, "tcp://", "pigeon://coop"])
def test_an_address_that_can_never_be_reached_is_peer_gone(endpoint: str) -> None:
    async def work() -> None:
        with pytest.raises(PeerGone, match="cannot connect"):
            Link(endpoint, PONG, PING, lambda _, __: None)

    run(work())


def test_an_error_in_a_handler_is_not_swallowed(sockets: Path) -> None:
    unhandled: list[BaseException] = []

    async def work() -> None:
        failed = asyncio.Event()
        loop = asyncio.get_running_loop()
        before = loop.get_exception_handler()
        assert before is not None

        def note(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
            before(loop, context)
            failed.set()

        loop.set_exception_handler(note)

        def handler(_: bytes, __: Ping, ___: list[memoryview]) -> None:
            raise KeyError("a mistake in the handler")

        inbox = Inbox(f"ipc://{sockets}/inbox", PING, handler)
        link: Link[Pong, Ping] = Link(inbox.endpoint, PONG, PING, lambda _, __: None)
        link.send(Ping(number=1))
        await failed.wait()
        link.close()
        inbox.close()

    run(work(), unhandled=unhandled)
    assert [type(error) for error in unhandled] == [KeyError]
