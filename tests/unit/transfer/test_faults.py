"""Real processes that die, come back, lie and are late: every write ends right or with a clear error, no slot leaks.

    sender killed in the middle of a write      test_a_writer_killed_in_the_middle_of_a_write
    receiver killed, started again there        test_a_receiver_killed_and_started_again_at_the_same_address
    frame cut short, frame oversized            test_frames_cut_short_or_beyond_all_bounds
    lease expired while its writer is inside    test_a_lease_that_ends_under_its_writer
    lease expired, pool full, generation used
    again, checksum broken, another cluster     test_what_the_receiver_refuses_is_told_in_words_and_the_next_write_lands
    two writers in one slot                     test_two_processes_never_write_into_one_slot
    engine gives up, and its bytes go on        test_an_engine_that_gave_a_write_up_and_goes_on_...,
                                                test_a_write_that_mooncake_itself_gave_up_...

A whole cluster under the same faults: e2e/test_transports.py, e2e/test_kill.py, e2e/test_soak.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from epdctl.errors import DeadlineExceeded, PeerGone, PoolExhausted, StaleGeneration
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.base import Piece, Transport
from epdctl.transfer.pool import Pool
from epdctl.wire.transfer import RemoteLease
from tests.support.ranks import run
from tests.support.rude_writers import FAULTS
from tests.support.transfer_ends import (
    POOL_BYTES,
    End,
    decoded,
    device_of,
    encoded,
    open_at,
    pattern,
    receiving,
    settle,
    writing,
)

HALF = POOL_BYTES // 2


CUDA = pytest.param(
    "cuda-ipc", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)
ONE_SIDED = ["shm", "mooncake", CUDA]  # zmq's writes are landed by one process, in order


@pytest.fixture(params=["zmq", *ONE_SIDED])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    return str(request.param)


class Here:
    """The receiver, in this process."""

    def __init__(self, backend: str, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settle(0.01, monkeypatch.setitem)
        self.device = device_of(backend)
        self.now = 0.0
        self.sockets = sockets
        self.transport: Transport = open_at(backend, f"ipc://{sockets}/here", "prefill/0")
        memory = self.transport.allocate(POOL_BYTES, self.device)
        self.pool = Pool("embeddings", memory, RangeAllocator(POOL_BYTES), clock=lambda: self.now)
        self.address = self.transport.register(self.pool)
        self.freed = asyncio.Event()
        self.pool.freed = self.freed.set

    def lease(self, nbytes: int = HALF) -> RemoteLease:
        return self.pool.lease(nbytes, "request", seconds=10.0).remote(self.address)

    def holds(self, lease: RemoteLease, seed: int) -> bool:
        extent = lease.extents[0]
        held = self.pool.memory[extent.offset :][: extent.nbytes]
        return torch.equal(held, pattern(extent.nbytes, seed).to(self.device))

    async def half(self, lease: RemoteLease, seed: int) -> None:
        """Returns when the first half of its bytes is there; the other is not."""
        start, middle = lease.extents[0].offset, lease.extents[0].nbytes // 2
        slot, data = self.pool.memory[start : start + 2 * middle], pattern(2 * middle, seed).to(self.device)
        while not torch.equal(slot[:middle], data[:middle]):  # noqa: ASYNC110 - memory has no events
            await asyncio.sleep(0)
        assert not slot[middle:].any()

    def release(self, *leases: RemoteLease) -> None:
        for lease in leases:
            self.pool.release(lease.lease)


@pytest.fixture
def here(
    backend: str, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Here, End], Awaitable[None]]], None]:
    """Runs a test between a receiver here and a writer in a process of its own; afterwards every slot is free."""

    def play(test: Callable[[Here, End], Awaitable[None]]) -> None:
        async def work() -> None:
            receiver = Here(backend, sockets, monkeypatch)
            with writing(backend, sockets) as writer:
                try:
                    await test(receiver, writer)
                    receiver.pool.check()
                    assert receiver.pool.allocator.free == POOL_BYTES, "a slot leaks"
                finally:
                    await receiver.transport.close()

        run(work())

    return play


Play = Callable[[Callable[[Here, End], Awaitable[None]]], None]


def test_a_writer_killed_in_the_middle_of_a_write(here: Play, backend: str) -> None:
    async def test(receiver: Here, writer: End) -> None:
        lost, other = receiver.lease(), receiver.lease()
        assert await writer.ask("half", encoded(lost), HALF, 1)
        await receiver.half(lost, 1)
        receiver.release(lost)
        assert receiver.pool.quarantined_bytes == (0 if backend == "zmq" else HALF)
        if backend != "zmq":
            with pytest.raises(PoolExhausted):
                receiver.lease()
        writer.kill()
        if backend != "zmq":
            await receiver.freed.wait()
        again = receiver.lease()
        receiver.release(again, other)

    here(test)


def test_a_lease_that_ends_under_its_writer(here: Play, backend: str) -> None:
    """Nobody gets its bytes before the writer has heard of it; then it needs no death to make them free."""

    async def test(receiver: Here, writer: End) -> None:
        late, other = receiver.lease(), receiver.lease()
        assert await writer.ask("half", encoded(late), HALF, 1)
        await receiver.half(late, 1)
        receiver.pool.filled(other.lease, other.generation)
        receiver.now = 10.0
        receiver.release(late)
        assert receiver.pool.quarantined_bytes == (0 if backend == "zmq" else HALF)
        assert await writer.ask("go_on")
        assert "StaleGeneration" in await writer.ask("ended")
        assert receiver.pool.quarantined_bytes == 0
        receiver.release(receiver.lease(), other)

    here(test)


@pytest.mark.parametrize("backend", ONE_SIDED, indirect=True)
def test_an_engine_that_gave_a_write_up_and_goes_on_writes_into_nobodys_slot(here: Play) -> None:
    """Its error is no end: not even its writer knows when the last byte comes, so the slot waits for its death."""

    async def test(receiver: Here, writer: End) -> None:
        lost, other = receiver.lease(), receiver.lease()
        assert await writer.ask("half_given_up", encoded(lost), HALF, 1)
        assert "the engine gave up" in await writer.ask("ended")
        receiver.release(lost)
        with pytest.raises(PoolExhausted):
            receiver.lease()
        assert await writer.ask("write", encoded(other), HALF, 2) == "done", "its other writes go on"
        receiver.pool.filled(other.lease, other.generation)
        assert await writer.ask("go_on")
        assert receiver.holds(lost, 1), "it did go on"
        assert receiver.holds(other, 2)
        assert receiver.pool.quarantined_bytes == HALF
        writer.kill()
        await receiver.freed.wait()
        receiver.release(receiver.lease(), other)

    here(test)


def test_a_write_that_mooncake_itself_gave_up_lands_in_nobodys_slot(sockets: Path) -> None:
    """The real engine, a receiver that stands still for longer than it waits, and bytes that go on when it is back."""
    pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    size = 64 << 20  # more than sockets take

    async def test() -> None:
        patience = {"MC_TRANSFER_TIMEOUT": "5"}  # seconds; less is not taken
        with (
            receiving("mooncake", f"ipc://{sockets}/there", size) as there,
            writing("mooncake", sockets, "encoder/0", **patience) as writer,
        ):
            lease = await there.ask("lease", size)
            assert await writer.ask("half", lease, size, 1)
            with there.standing_still():
                assert await writer.ask("go_on")
            assert "did not deliver" in await writer.ask("ended")
            assert await there.ask("free") == 0
            assert await there.ask("lease", size) == "PoolExhausted"
            writer.kill()
            assert await there.ask("freed") == size

    run(test())


COMES_OF_IT = {
    "payload_cut_short": "left",
    "frame_shorter_than_said": "refused: frames",
    "frame_above_a_message": "refused: frames",
    "frame_without_end": "hung up on",
    "message_cut_short": "Admitted",
    "message_without_its_end": "Attached",
    "piece_beyond_its_extent": "refused: bounds",
    "piece_of_less_than_nothing": "refused: bounds",
    "attached_twice": "Attached",
}


@pytest.mark.parametrize(
    ("backend", "fault"),
    [
        pytest.param(backend, fault.__name__, marks=CUDA.marks if backend == "cuda-ipc" else ())
        for backend, faults in FAULTS.items()
        for fault in faults
    ],
    indirect=["backend"],
)
def test_frames_cut_short_or_beyond_all_bounds(here: Play, backend: str, fault: str) -> None:
    """What a rude process does wrong is its own loss: its slot stays as it was, and an honest one goes on meanwhile."""

    async def test(receiver: Here, rude: End) -> None:
        mine, its = receiver.lease(), receiver.lease()
        with writing(backend, receiver.sockets, "encoder/1") as honest:
            assert await rude.ask(fault, encoded(its)) == COMES_OF_IT[fault]
            assert await honest.ask("write", encoded(mine), HALF, 1) == "done"
        extent = its.extents[0]
        assert not receiver.pool.memory[extent.offset :][: extent.nbytes].any(), "some of it was landed"
        receiver.release(its)
        rude.kill()
        if receiver.pool.quarantined_bytes:  # it was let in, and only its death says that it has stopped
            await receiver.freed.wait()
        assert receiver.holds(mine, 1)
        receiver.release(mine)

    here(test)


def test_what_the_receiver_refuses_is_told_in_words_and_the_next_write_lands(here: Play) -> None:
    async def test(receiver: Here, writer: End) -> None:
        good = receiver.lease()
        assert await writer.ask("write", encoded(good), HALF, 1) == "done"
        assert receiver.holds(good, 1)

        reused = receiver.lease()
        receiver.release(reused)
        anew = receiver.lease()
        assert anew.extents == reused.extents
        assert "StaleGeneration" in await writer.ask("write", encoded(reused), HALF, 2)
        with pytest.raises(PoolExhausted):
            receiver.lease()
        assert "another cluster" in await writer.ask("write", encoded(anew), HALF, 2, "guess")
        assert "have the checksum" in await writer.ask("write", encoded(anew), HALF, 2, "secret", "broken")
        assert await writer.ask("write", encoded(anew), HALF, 3) == "done"
        assert receiver.holds(anew, 3)
        assert receiver.holds(good, 1)
        receiver.now = 10.0
        assert "LeaseExpired" in await writer.ask("write", encoded(anew), HALF, 4)
        receiver.release(good, anew)

    here(test)


def test_a_receiver_killed_and_started_again_at_the_same_address(backend: str, sockets: Path) -> None:
    async def test() -> None:
        writer = open_at(backend, f"ipc://{sockets}/writer", "encoder/0")
        endpoint, device = f"ipc://{sockets}/there", device_of(backend)
        try:
            with receiving(backend, endpoint) as first:
                old = decoded(await first.ask("lease", 1000))
                await writer.write(old, [Piece(pattern(1000, 1).to(device), 0)], seconds=60)
                first.kill()
                with receiving(backend, endpoint) as second:
                    new = decoded(await second.ask("lease", 1000))
                    with pytest.raises((PeerGone, StaleGeneration, DeadlineExceeded)):
                        await writer.write(old, [Piece(pattern(1000, 2).to(device), 0)], seconds=60)
                    assert await second.ask("sum") == 0, "what was meant for the first never reaches the second"
                    await writer.write(new, [Piece(pattern(1000, 3).to(device), 0)], seconds=60)
                    assert await second.ask("sum") == int(pattern(1000, 3).sum())
                    assert await second.ask("free") == POOL_BYTES, "a slot leaks"
        finally:
            await writer.close()

    run(test())


@pytest.mark.parametrize("backend", ONE_SIDED, indirect=True)
def test_two_processes_never_write_into_one_slot(backend: str, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        receiver = Here(backend, sockets, monkeypatch)
        lease = receiver.lease()
        with writing(backend, sockets) as lost, writing(backend, sockets, "encoder/1") as other:
            assert await lost.ask("half", encoded(lease), HALF, 1)
            await receiver.half(lease, 1)
            assert "SlotBusy" in await other.ask("write", encoded(lease), HALF, 2)
            lost.kill()
            answer = await other.ask("write", encoded(lease), HALF, 2)
            while "SlotBusy" in answer:
                answer = await other.ask("write", encoded(lease), HALF, 2)
            assert answer == "done"
            assert receiver.holds(lease, 2)
        receiver.release(lease)
        assert receiver.pool.allocator.free == POOL_BYTES
        await receiver.transport.close()

    run(test())
