"""Peers and their links, the compute thread, tasks: the parts of every service."""

from __future__ import annotations

import asyncio
import functools
import threading
from pathlib import Path

import pytest

from epdctl.errors import PeerGone
from epdctl.ids import RankName, Stage
from epdctl.rank.compute import ComputeThread
from epdctl.rank.loading import Loads
from epdctl.rank.peers import Changes, Links, PeerTable
from epdctl.rank.tasks import Tasks
from epdctl.wire.lifecycle import Endpoints, Loading, Peer
from epdctl.wire.sockets import Inbox
from epdctl.wire.transfer import RECEIVER_TO_WRITER, WRITER_TO_RECEIVER, Landed, ReceiverToWriter, Write
from tests.support.ranks import Facts, make_peer, run


def test_a_table_says_who_joined_and_who_left() -> None:
    table = PeerTable(frozenset({Stage.PREFILL, Stage.DECODE}))
    a, a2, b = make_peer("prefill/0"), make_peer("prefill/0", incarnation=2), make_peer("decode/0")
    assert table.replace([make_peer("gateway/0"), a, b]) == Changes(joined=(a, b))
    assert table.replace([b, a]) == Changes()
    assert table.replace([a2, b]) == Changes(joined=(a2,), left=(a,))
    moved = make_peer("decode/0", Endpoints(inbox="ipc:///new"))
    assert table.replace([a2, moved]) == Changes(joined=(moved,), left=(b,))
    assert table.find(RankName("prefill/0")) == a2
    assert table.find(a.rank, a.incarnation) is None
    assert table.of(Stage.DECODE) == [moved]
    assert (len(table), a in table, a2 in table) == (2, False, True)
    assert table.replace([]) == Changes(left=(a2, moved))


class Receiver:
    def __init__(self, sockets: Path, name: str, incarnation: int = 1) -> None:
        self.got = Facts()
        self.inbox: Inbox[Write] = Inbox(f"ipc://{sockets}/{name}.{incarnation}", WRITER_TO_RECEIVER, self._take)
        self.peer = make_peer(f"prefill/{name}", Endpoints(inbox=self.inbox.endpoint), incarnation)

    def _take(self, sender: bytes, write: Write, _: list[memoryview]) -> None:
        self.got.add(write.write)
        self.inbox.reply(sender, Landed(write=write.write), RECEIVER_TO_WRITER)


def write(number: int) -> Write:
    return Write(write=number, pool="p", lease=1, generation=1, pieces=[])


def test_links_open_on_demand_and_close_with_their_peer(sockets: Path) -> None:
    async def work() -> None:
        first, second = Receiver(sockets, "0"), Receiver(sockets, "1")
        answers, lost = Facts(), list[Peer]()
        links: Links[ReceiverToWriter, Write] = Links(
            RECEIVER_TO_WRITER,
            WRITER_TO_RECEIVER,
            lambda peer, message, _: answers.add((peer.rank, message.write)),
            stages=frozenset({Stage.PREFILL}),
            lost=lost.append,
        )
        with pytest.raises(PeerGone, match="withdrawn"):
            links.send(first.peer, write(1))
        links.peers_changed([first.peer, second.peer, make_peer("gateway/0"), make_peer("prefill/9")])
        links.send(first.peer, write(1))
        links.send(second.peer, write(2))
        assert sorted(await answers.count(2)) == [("prefill/0", 1), ("prefill/1", 2)]
        with pytest.raises(PeerGone, match="has no inbox"):
            links.send(make_peer("prefill/9"), write(3))
        again = Receiver(sockets, "0", incarnation=2)
        links.peers_changed([again.peer, second.peer])
        assert lost == [first.peer, make_peer("prefill/9")]
        with pytest.raises(PeerGone, match="incarnation 1"):
            links.send(first.peer, write(4))
        links.send(again.peer, write(5))
        await again.got.count(1)
        assert (again.got.seen, first.got.seen) == ([5], [1])
        links.close()
        with pytest.raises(PeerGone):
            links.send(second.peer, write(6))
        for receiver in (first, second, again):
            receiver.inbox.close()

    run(work())


def fail(text: str) -> None:
    raise ZeroDivisionError(text)


def test_jobs_run_in_order_on_one_thread_and_answer_on_the_loop() -> None:
    async def work() -> None:
        compute, seen, results = ComputeThread(), list[tuple[int, str]](), Facts()

        def job(number: int) -> int:
            seen.append((number, threading.current_thread().name))
            return number

        for number in range(5):
            compute.post(functools.partial(job, number), results.add)
        assert await compute.run(lambda: job(5)) == 5
        assert results.seen == [0, 1, 2, 3, 4]
        assert seen == [(number, "compute") for number in range(6)]
        with pytest.raises(ZeroDivisionError, match="told"):
            await compute.run(lambda: fail("told"))
        assert await compute.run(lambda: 7) == 7
        assert await compute.close()
        with pytest.raises(RuntimeError, match="closed"):
            compute.post(lambda: None)

    run(work())


def test_a_job_that_fails_where_nobody_waits_reaches_the_loops_handler() -> None:
    unhandled: list[BaseException] = []

    async def work() -> None:
        compute, begun, go = ComputeThread(), threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            assert go.wait(60)
            fail("its awaiter is gone")

        compute.post(lambda: fail("posted"))
        waiting = asyncio.ensure_future(compute.run(slow))
        await asyncio.to_thread(begun.wait, 60)
        waiting.cancel()
        await asyncio.wait([waiting])
        go.set()
        assert await compute.close()

    run(work(), unhandled=unhandled)
    assert [str(error) for error in unhandled] == ["posted", "its awaiter is gone"]


def test_closing_does_not_wait_for_a_job_that_hangs() -> None:
    async def work() -> None:
        compute, release = ComputeThread(), threading.Event()
        compute.post(lambda: release.wait(60))
        assert not await compute.close(seconds=0.01)
        release.set()
        assert await compute.close()

    run(work())


def test_a_task_that_fails_is_told_and_one_that_is_cancelled_is_not() -> None:
    unhandled: list[BaseException] = []

    async def work() -> None:
        tasks, ended = Tasks(), list[str]()

        async def failing() -> None:
            fail("in a task")

        async def waiting() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("waiting")

        await asyncio.wait([tasks.start(failing())])
        task = tasks.start(waiting())
        await asyncio.sleep(0)
        assert len(tasks) == 1
        await tasks.close()
        assert task.cancelled()
        assert ended == ["waiting"]
        assert len(tasks) == 0

    run(work(), unhandled=unhandled)
    assert [str(error) for error in unhandled] == ["in a task"]


def test_loading_is_reported_by_phase_and_a_few_times_a_second() -> None:
    said: list[Loading] = []
    loads = Loads(said.append)
    for done in range(1001):
        loads.report("weights", done, 1000, now=10 + done / 1024)
    loads.report("pools", 0, 1, now=11.0)
    assert [message.done for message in said] == [0, 205, 410, 615, 820, 1000, 0]
    assert [message.phase for message in said] == ["weights"] * 6 + ["pools"]
