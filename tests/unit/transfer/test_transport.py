"""What every transport promises, run over each of them."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
import torch

from epdctl.errors import (
    DeadlineExceeded,
    LeaseExpired,
    OutOfReach,
    PeerGone,
    RegistrationFailed,
    SlotBusy,
    StaleGeneration,
    TransferError,
    UserError,
    WritesAdrift,
)
from epdctl.ids import Incarnation, RankName
from epdctl.transfer import guests, hosts, landing, zmq
from epdctl.transfer.allocators import RangeAllocator
from epdctl.transfer.base import Piece, Transport
from epdctl.transfer.cuda_ipc import CudaIpcMover
from epdctl.transfer.deaths import birth
from epdctl.transfer.landing import Frame, Owner
from epdctl.transfer.memory import Exchange, MemoryTransport
from epdctl.transfer.mooncake import MooncakeMover
from epdctl.transfer.movers import Mover
from epdctl.transfer.onesided import OneSidedTransport
from epdctl.transfer.open import BACKENDS, open_transport
from epdctl.transfer.pool import Pool
from epdctl.transfer.shm import ShmMover
from epdctl.transfer.tensors import as_bytes, spec_of, spread
from epdctl.transfer.zmq import ZmqTransport
from epdctl.wire.config import TransferConfig
from epdctl.wire.sockets import Buffer, Inbox, Link
from epdctl.wire.transfer import (
    GUEST_TO_HOST,
    HOST_TO_GUEST,
    RECEIVER_TO_WRITER,
    WRITER_TO_RECEIVER,
    Attach,
    Begin,
    End,
    Extent,
    GuestToHost,
    HostToGuest,
    Landed,
    PieceHeader,
    PoolAddress,
    ReceiverToWriter,
    Rejected,
    RemoteLease,
    Write,
)
from tests.support.host_memory import HostMemory
from tests.support.ranks import Facts, make_spec, run


class Fabric(Protocol):
    """One kind of transport, and ways to be rude over it."""

    def open(self, name: str, token: str = "secret", *, checksum: bool = False) -> Transport: ...

    def black_hole(self) -> tuple[str, Facts]:
        """An endpoint that takes messages and never answers; the facts are those messages."""
        ...

    def close(self) -> None: ...


class Messaging(Fabric, Protocol):
    """Its bytes travel in messages."""

    async def raw(self, endpoint: str, write: Write, frames: list[Buffer]) -> ReceiverToWriter:
        """Put ``write`` there as it is, past the writer's own care."""
        ...


def owner(name: str, token: str, checksum: bool = False) -> Owner:
    return Owner(RankName(name), Incarnation(1), token, checksum)


class OverZmq:
    def __init__(self, sockets: Path) -> None:
        self.sockets = sockets
        self.holes: list[Inbox[Write]] = []

    def open(self, name: str, token: str = "secret", *, checksum: bool = False) -> Transport:
        return ZmqTransport(f"ipc://{self.sockets}/{name.replace('/', '-')}", owner(name, token, checksum))

    async def raw(self, endpoint: str, write: Write, frames: list[Buffer]) -> ReceiverToWriter:
        answers = Facts()
        link: Link[ReceiverToWriter, Write] = Link(
            endpoint, RECEIVER_TO_WRITER, WRITER_TO_RECEIVER, lambda answer, _: answers.add(answer)
        )
        link.send(write, frames)
        (answer,) = await answers.count(1)
        link.close()
        assert isinstance(answer, Landed | Rejected)
        return answer

    def black_hole(self) -> tuple[str, Facts]:
        taken = Facts()
        endpoint = f"ipc://{self.sockets}/hole"
        self.holes.append(Inbox(endpoint, WRITER_TO_RECEIVER, lambda _, write, __: taken.add(write)))
        return endpoint, taken

    def close(self) -> None:
        for hole in self.holes:
            hole.close()


class WithinProcess:
    def __init__(self, _: Path) -> None:
        self.exchange = Exchange()

    def open(self, name: str, token: str = "secret", *, checksum: bool = False) -> Transport:
        return MemoryTransport(f"memory://{name}", owner(name, token, checksum), self.exchange)

    async def raw(self, endpoint: str, write: Write, frames: list[Buffer]) -> ReceiverToWriter:
        return await self.exchange.deliver(endpoint, write, frames)

    def black_hole(self) -> tuple[str, Facts]:
        taken = Facts()

        async def swallow(_: str, write: Write, __: Sequence[Frame]) -> Sequence[Frame]:
            taken.add(write)
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        self.exchange.passing = swallow
        return "memory://hole", taken

    def close(self) -> None:
        pass


class OverTcp(OverZmq):
    """ZMQ where there is no common file system."""

    def open(self, name: str, token: str = "secret", *, checksum: bool = False) -> Transport:
        return ZmqTransport(f"tcp://127.0.0.1:{free_port()}", owner(name, token, checksum))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OneSided:
    """Its writers put the bytes there by themselves."""

    def __init__(self, sockets: Path) -> None:
        self.sockets = sockets
        self.holes: list[Inbox[GuestToHost]] = []

    def mover(self) -> Mover:
        raise AssertionError("a kind of OneSided says")

    def open(self, name: str, token: str = "secret", *, checksum: bool = False) -> Transport:
        endpoint = f"ipc://{self.sockets}/{name.replace('/', '-')}"
        return OneSidedTransport(endpoint, owner(name, token, checksum), self.mover())

    def black_hole(self) -> tuple[str, Facts]:
        taken = Facts()
        endpoint = f"ipc://{self.sockets}/hole"
        self.holes.append(Inbox(endpoint, GUEST_TO_HOST, lambda _, said, __: taken.add(said)))
        return endpoint, taken

    def close(self) -> None:
        for hole in self.holes:
            hole.close()


class OverShm(OneSided):
    def mover(self) -> Mover:
        return ShmMover()


class OverMooncake(OneSided):
    def mover(self) -> Mover:
        pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
        return MooncakeMover("tcp", torch.device("cpu"))


class OverCudaIpc(OneSided):
    """This process's own memory in place of GPUs."""

    def __init__(self, sockets: Path) -> None:
        super().__init__(sockets)
        self.memory = HostMemory()

    def mover(self) -> Mover:
        return CudaIpcMover(self.memory, torch.device("cpu"))

    def close(self) -> None:
        super().close()
        assert self.memory.all_closed(), "memory of a peer is held"


@pytest.fixture(params=[OverZmq, OverTcp, WithinProcess, OverShm, OverMooncake, OverCudaIpc])
def make_fabric(request: pytest.FixtureRequest, sockets: Path) -> Callable[[], Fabric]:
    return lambda: request.param(sockets)


@pytest.fixture(params=[OverZmq, WithinProcess])
def make_messaging(request: pytest.FixtureRequest, sockets: Path) -> Callable[[], Messaging]:
    return lambda: request.param(sockets)


@pytest.fixture(params=[OverShm, OverMooncake, OverCudaIpc])
def make_one_sided(request: pytest.FixtureRequest, sockets: Path) -> Callable[[], Fabric]:
    return lambda: request.param(sockets)


class Receiver:
    """A rank with one pool of 1 MiB."""

    def __init__(self, fabric: Fabric, nbytes: int = 1 << 20) -> None:
        self.now = 0.0
        self.transport = fabric.open("prefill/0")
        memory = self.transport.allocate(nbytes, torch.device("cpu"))
        self.pool = Pool("embeddings", memory, RangeAllocator(nbytes), clock=lambda: self.now)
        self.address = self.transport.register(self.pool)

    def lease(self, nbytes: int) -> RemoteLease:
        return self.pool.lease(nbytes, "request", seconds=10.0).remote(self.address)

    def held(self, lease: RemoteLease) -> torch.Tensor:
        extent = lease.extents[0]
        return self.pool.memory[extent.offset : extent.offset + extent.nbytes]


def rubbish(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def between(make_fabric: Callable[[], Any], test: Callable, nbytes: int = 1 << 20) -> None:
    """Run ``test(fabric, receiver, writer)`` and close everything."""

    async def work() -> None:
        fabric = make_fabric()
        receiver, writer = Receiver(fabric, nbytes), fabric.open("encoder/0")
        try:
            await test(fabric, receiver, writer)
            receiver.pool.check()
            for lease in receiver.pool.leases.live():
                receiver.pool.release(lease.id)
            assert receiver.pool.allocator.free == receiver.pool.allocator.total, "a slot leaks"
        finally:
            await writer.close()
            await receiver.transport.close()
            fabric.close()

    run(work())


def test_bytes_land_where_the_lease_says_and_nowhere_else(make_fabric: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        before, lease, after = (receiver.lease(size) for size in (300, 70_001, 300))
        data = rubbish(70_001)
        await writer.write(lease, [Piece(data[:5], 0), Piece(data[5:], 0, 5)], seconds=30)
        assert torch.equal(receiver.held(lease), data)
        assert not receiver.held(before).any()
        assert not receiver.held(after).any()
        assert int(receiver.pool.memory.count_nonzero()) == int(data.count_nonzero())

    between(make_fabric, test)


def test_a_peer_that_was_greeted_is_written_to_like_any_other(make_fabric: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        await writer.greet(receiver.transport.endpoint)
        lease, data = receiver.lease(300), rubbish(300)
        await writer.write(lease, [Piece(data, 0)], seconds=30)
        assert torch.equal(receiver.held(lease), data)

    between(make_fabric, test)


def test_a_greeting_opens_a_peers_memory_once_for_all_writes(sockets: Path) -> None:
    async def test(fabric: Any, receiver: Receiver, writer: Transport) -> None:
        await writer.greet(receiver.transport.endpoint)
        assert len(fabric.memory.opened) == 1
        await writer.write(receiver.lease(300), [Piece(rubbish(300), 0)], seconds=30)
        assert fabric.memory.openings == 1
        writer.withdraw(receiver.transport.endpoint)
        assert await asyncio.to_thread(fabric.memory.all_closed)

    between(lambda: OverCudaIpc(sockets), test)


def test_first_writes_that_come_at_once_open_a_peers_memory_once(sockets: Path) -> None:
    async def test(fabric: Any, receiver: Receiver, writer: Transport) -> None:
        leases = [receiver.lease(300) for _ in range(4)]
        await asyncio.gather(*(writer.write(lease, [Piece(rubbish(300), 0)], seconds=30) for lease in leases))
        assert fabric.memory.openings == 1

    between(lambda: OverCudaIpc(sockets), test)


def test_what_was_in_a_greetings_way_may_pass(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "GREET_PAUSE", 0.01)

    async def test(fabric: Any, receiver: Receiver, writer: Transport) -> None:
        fabric.memory.hidden = TransferError("no peer access")
        greeting = asyncio.create_task(writer.greet(receiver.transport.endpoint))
        assert await asyncio.to_thread(fabric.memory.refused.wait, 30)
        fabric.memory.hidden = None
        await greeting
        assert fabric.memory.openings == 1

    between(lambda: OverCudaIpc(sockets), test)


def test_a_peer_that_leaves_while_it_is_greeted_is_gone_and_not_out_of_reach(sockets: Path) -> None:
    async def test(fabric: Any, receiver: Receiver, writer: Transport) -> None:
        fabric.memory.hidden = TransferError("no peer access")
        greeting = asyncio.create_task(writer.greet(receiver.transport.endpoint))
        assert await asyncio.to_thread(fabric.memory.refused.wait, 30)
        writer.withdraw(receiver.transport.endpoint)
        with pytest.raises(PeerGone, match="was withdrawn"):
            await greeting
        fabric.memory.hidden = None

    between(lambda: OverCudaIpc(sockets), test)


@pytest.mark.parametrize(
    ("why", "told"), [(TransferError("no peer access"), OutOfReach), (PeerGone("too many open files"), PeerGone)]
)
def test_what_stays_in_a_greetings_way_is_told_and_a_later_write_may_get_through(
    sockets: Path, monkeypatch: pytest.MonkeyPatch, why: Exception, told: type[Exception]
) -> None:
    monkeypatch.setattr(hosts, "GREET_SECONDS", 0)

    async def test(fabric: Any, receiver: Receiver, writer: Transport) -> None:
        fabric.memory.hidden = why
        with pytest.raises(told, match=str(why)):
            await writer.greet(receiver.transport.endpoint)
        fabric.memory.hidden = None
        lease, data = receiver.lease(300), rubbish(300)
        await writer.write(lease, [Piece(data, 0)], seconds=30)
        assert torch.equal(receiver.held(lease), data)

    between(lambda: OverCudaIpc(sockets), test)


def test_a_greeting_that_nobody_answers_has_an_end(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "ATTACH_SECONDS", 0)

    async def test(fabric: Fabric, _: Receiver, writer: Transport) -> None:
        endpoint, taken = fabric.black_hole()
        with pytest.raises(DeadlineExceeded, match="did not let us in"):
            await writer.greet(endpoint)
        assert isinstance((await taken.count(1))[0], Attach)

    between(make_one_sided, test)


def test_a_greeting_from_another_cluster_is_refused_and_no_fault_of_the_memory(sockets: Path) -> None:
    async def test(fabric: Any, receiver: Receiver, _: Transport) -> None:
        stranger = fabric.open("encoder/7", "guess")
        with pytest.raises(TransferError, match="another cluster") as caught:
            await stranger.greet(receiver.transport.endpoint)
        assert not isinstance(caught.value, OutOfReach)
        await stranger.close()

    between(lambda: OverCudaIpc(sockets), test)


def test_many_extents_many_pieces_and_pieces_larger_than_a_message(
    make_fabric: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing, "PARCEL_BYTES", 10_000)
    monkeypatch.setattr(landing, "MAX_PIECES", 3)

    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        leases = [receiver.lease(size) for size in (25_001, 10_000, 40_000, 1, 256)]
        together = leases[0]
        data = [rubbish(lease.extents[0].nbytes, seed) for seed, lease in enumerate(leases)]
        for lease, part in zip(leases, data, strict=True):
            await writer.write(lease, [Piece(part, 0)], seconds=30)
        assert all(torch.equal(receiver.held(lease), part) for lease, part in zip(leases, data, strict=True))
        pieces = [Piece(data[0][at : at + 1000], 0, at) for at in range(0, 25_001, 1000)]
        await asyncio.gather(*(writer.write(together, pieces, seconds=30) for _ in range(4)))
        assert torch.equal(receiver.held(together), data[0])

    between(make_fabric, test)


def test_a_tensor_is_spread_over_its_extents(make_fabric: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.pool.leases.grant(
            [*receiver.pool.allocator.take(256), *receiver.pool.allocator.take(256)], "r", seconds=10
        )
        embedding = torch.randn(30, 4).t()  # not contiguous
        await writer.write(lease.remote(receiver.address), spread(as_bytes(embedding), lease.extents), seconds=30)
        assert torch.equal(receiver.pool.memory[:480].view(torch.float32).view(4, 30), embedding)
        assert spec_of(embedding).shape == [4, 30]
        with pytest.raises(TransferError, match="do not fit"):
            spread(rubbish(513), lease.extents)

    between(make_fabric, test)


def test_a_stale_generation_is_refused(make_fabric: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        old = receiver.lease(1000)
        receiver.pool.release(old.lease)
        new = receiver.lease(1000)
        assert new.extents == old.extents
        with pytest.raises(StaleGeneration, match="has ended"):
            await writer.write(old, [Piece(rubbish(1000), 0)], seconds=30)
        assert not receiver.held(new).any()

    between(make_fabric, test)


def test_an_expired_lease_is_refused(make_fabric: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(1000)
        receiver.now = 10.0
        with pytest.raises(LeaseExpired):
            await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        assert not receiver.held(lease).any()

    between(make_fabric, test)


def test_what_comes_after_the_slot_was_filled_counts_as_landed_and_changes_nothing(
    make_fabric: Callable[[], Fabric],
) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(1000)
        await writer.write(lease, [Piece(rubbish(1000, 1), 0)], seconds=30)
        receiver.pool.filled(lease.lease, lease.generation)
        await writer.write(lease, [Piece(rubbish(1000, 2), 0)], seconds=30)
        assert torch.equal(receiver.held(lease), rubbish(1000, 1))

    between(make_fabric, test)


@pytest.mark.parametrize(
    ("extent", "offset", "nbytes"), [(0, 0, 1001), (0, 1, 1000), (0, 1000, 1), (1, 0, 1), (-1, 0, 1), (0, -1, 1)]
)
def test_no_piece_may_leave_its_extent(
    make_fabric: Callable[[], Fabric], extent: int, offset: int, nbytes: int
) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        receiver.lease(256)
        lease = receiver.lease(1000)
        pieces = [Piece(rubbish(10), 0), Piece(rubbish(nbytes), extent, offset)]
        with pytest.raises(TransferError, match="refused"):
            await writer.write(lease, pieces, seconds=30)
        assert not receiver.pool.memory.any(), "a message is landed whole or not at all"

    between(make_fabric, test)


def message(lease: RemoteLease, sizes: list[int], changed: dict) -> Write:
    fields: dict = {
        "write": 1,
        "pool": lease.pool.pool,
        "lease": lease.lease,
        "generation": lease.generation,
        "pieces": [PieceHeader(extent=0, offset=0, nbytes=size) for size in sizes],
        "token": "secret",
    }
    return Write(**{**fields, **changed})


@pytest.mark.parametrize(
    ("sizes", "frames", "changed", "kind"),
    [
        ([100], [b"x" * 99], {}, "frames"),
        ([100], [b"x" * 101], {}, "frames"),
        ([100], [], {}, "frames"),
        ([100], [b"x" * 100] * 2, {}, "frames"),
        ([(16 << 20) + 1], [bytes((16 << 20) + 1)], {}, "frames"),
        ([-1], [b"x"], {}, "frames"),
        ([100], [b"x" * 100], {"pool": "kv"}, "stale"),
        ([100], [b"x" * 100], {"generation": 1}, "stale"),
        ([100], [b"x" * 100], {"lease": 77}, "stale"),
        ([100], [b"x" * 100], {"token": ""}, "token"),
        ([100], [b"x" * 100], {"token": "sécret"}, "token"),
    ],
)
def test_a_malformed_message_is_refused_with_its_kind_and_the_next_one_lands(
    make_messaging: Callable[[], Messaging], sizes: list[int], frames: list[Buffer], changed: dict, kind: str
) -> None:
    async def test(fabric: Messaging, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(1000)
        answer = await fabric.raw(receiver.address.endpoint, message(lease, sizes, changed), frames)
        assert isinstance(answer, Rejected)
        assert answer.kind == kind
        assert not receiver.pool.memory.any()
        await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        assert torch.equal(receiver.held(lease), rubbish(1000))

    between(make_messaging, test)


def test_a_writer_of_another_cluster_is_told_so(make_fabric: Callable[[], Fabric]) -> None:
    async def test(fabric: Fabric, receiver: Receiver, _: Transport) -> None:
        stranger = fabric.open("encoder/9", token="another")
        with pytest.raises(TransferError, match="another cluster"):
            await stranger.write(receiver.lease(8), [Piece(rubbish(8), 0)], seconds=30)
        await stranger.close()

    between(make_fabric, test)


def at(endpoint: str, lease: RemoteLease) -> RemoteLease:
    pool = lease.pool
    address = PoolAddress(
        owner=pool.owner, incarnation=pool.incarnation, pool=pool.pool, backend=pool.backend, endpoint=endpoint
    )
    return RemoteLease(pool=address, lease=lease.lease, generation=lease.generation, extents=lease.extents)


def test_a_peer_withdrawn_in_the_middle_fails_its_writes_and_no_others(
    make_fabric: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing, "PARCEL_BYTES", 100)

    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(1000)
        await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        endpoint, taken = fabric.black_hole()
        lost = at(endpoint, lease)
        writes = [asyncio.ensure_future(writer.write(lost, [Piece(rubbish(1000), 0)], seconds=3600)) for _ in range(3)]
        await taken.count(1)
        writer.withdraw(endpoint)
        ends = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(end) for end in ends] == [PeerGone] * 3
        writer.withdraw(endpoint)

    between(make_fabric, test)


def test_a_peer_that_never_answers_is_a_deadline(make_fabric: Callable[[], Fabric]) -> None:
    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        endpoint, taken = fabric.black_hole()
        with pytest.raises(DeadlineExceeded, match="prefill/0 did not take the bytes"):
            await writer.write(at(endpoint, receiver.lease(8)), [Piece(rubbish(8), 0)], seconds=0.01)
        for _ in range(10):
            with pytest.raises(DeadlineExceeded):
                await writer.write(at(endpoint, receiver.lease(8)), [Piece(rubbish(8), 0)], seconds=0.001)
        await taken.count(1)

    between(make_fabric, test)


def test_writes_that_were_given_up_keep_their_room_until_they_are_answered(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZMQ has their bytes as long as the peer does not read: of one that stands still it has a window, and not more."""
    monkeypatch.setattr(zmq, "WINDOW", 3)
    monkeypatch.setattr(landing, "PARCEL_BYTES", 100)

    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(1000)
        await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        endpoint, taken = fabric.black_hole()
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                await writer.write(at(endpoint, lease), [Piece(rubbish(1000), 0)], seconds=0.01)
        waiting = asyncio.ensure_future(writer.write(at(endpoint, lease), [Piece(rubbish(1000), 0)], seconds=30))
        await taken.count(3)
        assert isinstance(writer, ZmqTransport)
        while not writer._peers[endpoint]._window._waiters:  # noqa: ASYNC110 - it has no events
            await asyncio.sleep(0)
        writer.withdraw(endpoint)
        with pytest.raises(PeerGone):
            await waiting
        assert len(taken.seen) == 3
        (peer,) = writer._peers.values()
        with pytest.raises(asyncio.TimeoutError):  # given up at the real peer, which answers
            async with asyncio.timeout(0):
                await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        assert (peer._unanswered, peer._window._value) == ({}, 3)

    between(lambda: OverZmq(sockets), test)


def test_a_write_that_is_cancelled_leaves_the_transport_usable(make_fabric: Callable[[], Fabric]) -> None:
    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        endpoint, taken = fabric.black_hole()
        write = asyncio.ensure_future(writer.write(at(endpoint, receiver.lease(8)), [Piece(rubbish(8), 0)], seconds=60))
        await taken.count(1)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write

    between(make_fabric, test)


def test_a_closed_transport_ends_its_writes(make_fabric: Callable[[], Fabric]) -> None:
    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        endpoint, taken = fabric.black_hole()
        write = asyncio.ensure_future(writer.write(at(endpoint, receiver.lease(8)), [Piece(rubbish(8), 0)], seconds=60))
        await taken.count(1)
        await writer.close()
        with pytest.raises(PeerGone):
            await write

    between(make_fabric, test)


def test_a_peer_that_was_withdrawn_just_before_the_end_is_closed_too(make_one_sided: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        await writer.write(receiver.lease(8), [Piece(rubbish(8), 0)], seconds=30)
        assert isinstance(writer, OneSidedTransport)
        (peer,) = writer._peers.values()
        writer.withdraw(receiver.address.endpoint)
        await writer.close()
        assert peer._calls._link.closed

    between(make_one_sided, test)


def test_a_receiver_that_fails_to_land_bytes_says_so_and_the_writer_goes_on(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unanswered, each such message kept its room in the window for good."""

    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        assert isinstance(receiver.transport, ZmqTransport)
        land = receiver.transport._landings.land

        def broken(*_: object) -> None:
            raise RuntimeError("the device is out of memory")

        monkeypatch.setattr(receiver.transport._landings, "land", broken)
        for _number in range(2 * zmq.WINDOW):
            with pytest.raises(TransferError, match="out of memory"):
                await writer.write(receiver.lease(8), [Piece(rubbish(8), 0)], seconds=30)
        monkeypatch.setattr(receiver.transport._landings, "land", land)
        await writer.write(receiver.lease(8), [Piece(rubbish(8), 0)], seconds=30)

    between(lambda: OverZmq(sockets), test)


def test_a_writer_whose_writes_are_adrift_must_go_before_their_reader(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        await writer.write(receiver.lease(8), [Piece(rubbish(8), 0)], seconds=30)
        assert isinstance(writer, OneSidedTransport)
        (peer,) = writer._peers.values()

        async def gives_up(*_: object) -> None:
            raise TransferError("the engine gave up")

        monkeypatch.setattr(peer, "_move", gives_up)
        with pytest.raises(TransferError, match="the engine gave up"):
            await writer.write(receiver.lease(8), [Piece(rubbish(8), 0)], seconds=30)
        writer.bound_adrift()  # the peer may be dying, and is withdrawn then
        monkeypatch.setattr(hosts, "ADRIFT_SECONDS", -1.0)
        with pytest.raises(WritesAdrift, match=r"1 writes to .* were given up"):
            writer.bound_adrift()
        writer.withdraw(receiver.address.endpoint)
        writer.bound_adrift()
        assert isinstance(receiver.transport, OneSidedTransport)
        for guest in receiver.transport._guests._guests.values():
            guests._leave_all(guest)  # as the writer's death would have it

    between(make_one_sided, test)


def test_a_pool_is_registered_once(make_fabric: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, __: Transport) -> None:
        assert receiver.address.endpoint == receiver.transport.endpoint
        assert (receiver.address.owner, receiver.address.pool) == ("prefill/0", "embeddings")
        with pytest.raises(RegistrationFailed):
            receiver.transport.register(receiver.pool)

    between(make_fabric, test)


def test_the_backend_of_the_topology_decides(sockets: Path) -> None:
    async def work() -> None:
        spec = make_spec("prefill/0", sockets)
        for backend in BACKENDS.keys() - {"cuda-ipc"}:
            if backend == "mooncake":
                pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
            transport = open_transport(TransferConfig(backend=backend, protocol="tcp"), spec)
            assert backend in transport.note
            assert transport.endpoint == f"ipc://{sockets}/prefill-0.1.transfer"
            await transport.close()
        with pytest.raises(UserError, match="pigeon"):
            open_transport(TransferConfig(backend="pigeon"), spec)
        with pytest.raises(UserError, match="cuda-ipc moves memory of GPUs, not of cpu"):
            open_transport(TransferConfig(backend="cuda-ipc"), spec)
        with pytest.raises(UserError, match="smoke"):
            open_transport(TransferConfig(backend="mooncake", protocol="smoke"), spec)

    run(work())


def test_an_embedding_may_be_made_in_its_slot(sockets: Path) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(1000)
        slot = await writer.open_slot(lease, seconds=30)
        assert slot is not None
        slot.copy_(rubbish(1000))
        assert torch.equal(receiver.held(lease), rubbish(1000)), "they are the same bytes"
        with pytest.raises(SlotBusy):
            receiver.pool.filled(lease.lease, lease.generation)
        await writer.write(lease, [Piece(slot, 0)], seconds=30)
        receiver.pool.filled(lease.lease, lease.generation)
        assert isinstance(writer, OneSidedTransport)
        assert writer.moved.nbytes == 0, "and were not copied onto themselves"

    between(lambda: OverShm(sockets), test)


def test_a_slot_that_is_opened_twice_is_ended_once(sockets: Path) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        written, dropped = receiver.lease(1000), receiver.lease(1000)
        for lease in (written, dropped):
            slot, again = [await writer.open_slot(lease, seconds=30) for _time in range(2)]
            assert slot is not None
            assert again is not None
            assert slot.data_ptr() == again.data_ptr()
        await writer.write(written, [Piece(rubbish(1000), 0)], seconds=30)
        receiver.pool.filled(written.lease, written.generation)
        left = asyncio.Event()
        receiver.pool.freed = left.set
        receiver.pool.release(dropped.lease)
        writer.drop_slot(dropped)
        await left.wait()

    between(lambda: OverShm(sockets), test)


def test_a_slot_that_was_dropped_or_given_up_comes_back(sockets: Path) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        dropped, ended = receiver.lease(1000), receiver.lease(1000)
        for lease in (dropped, ended):
            assert await writer.open_slot(lease, seconds=30) is not None
        writer.drop_slot(dropped)
        receiver.pool.release(ended.lease)
        assert receiver.pool.quarantined_bytes == 1000
        with pytest.raises(StaleGeneration):
            await writer.write(ended, [Piece(rubbish(1000), 0)], seconds=30)
        assert receiver.pool.quarantined_bytes == 0
        await writer.write(dropped, [Piece(rubbish(1000), 0)], seconds=30)

    between(lambda: OverShm(sockets), test)


@pytest.mark.parametrize("written", [True, False])
def test_a_slot_opened_at_a_peer_that_was_withdrawn_comes_back(
    make_one_sided: Callable[[], Fabric], written: bool
) -> None:
    """The peer may live on: what its slots are quarantined for must reach it."""

    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease, freed = receiver.lease(1000), asyncio.Event()
        receiver.pool.freed = freed.set
        await writer.open_slot(lease, seconds=30)
        writer.withdraw(receiver.address.endpoint)
        receiver.pool.release(lease.lease)
        assert receiver.pool.quarantined_bytes == 1000
        if written:
            with pytest.raises(PeerGone):
                await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        writer.drop_slot(lease)
        await freed.wait()
        again = receiver.lease(1000)
        await writer.write(again, [Piece(rubbish(1000), 0)], seconds=30)

    between(make_one_sided, test)


def test_who_is_let_in_after_its_peer_was_withdrawn_leaves_again(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asked, the peer was slow, and was given up: the answer finds nobody who would write."""

    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        early, late = receiver.lease(1000), receiver.lease(1000)
        await writer.write(early, [Piece(rubbish(1000), 0)], seconds=30)
        pool, enter, left = receiver.pool, receiver.pool.enter, asyncio.Event()

        def enter_late(*words: Any) -> Sequence[Extent]:
            writer.withdraw(receiver.address.endpoint)
            return enter(*words)

        def leave(*words: Any) -> None:
            Pool.leave(pool, *words)
            left.set()

        monkeypatch.setattr(pool, "enter", enter_late)
        monkeypatch.setattr(pool, "leave", leave)
        with pytest.raises(PeerGone):
            await writer.write(late, [Piece(rubbish(1000), 0)], seconds=30)
        await left.wait()
        pool.filled(late.lease, late.generation)

    between(make_one_sided, test)


def test_a_process_that_attaches_anew_is_one_guest(make_one_sided: Callable[[], Fabric]) -> None:
    """Unless something is still written over an earlier link of it."""

    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        assert isinstance(receiver.transport, OneSidedTransport)
        lease, opened = receiver.lease(1000), receiver.lease(1000)
        for _time in range(3):
            await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
            writer.withdraw(receiver.address.endpoint)
        assert len(receiver.transport._guests._guests) == 1
        await writer.open_slot(opened, seconds=30)
        writer.withdraw(receiver.address.endpoint)
        await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        assert len(receiver.transport._guests._guests) == 2
        left = asyncio.Event()
        receiver.pool.freed = left.set
        receiver.pool.release(opened.lease)
        writer.drop_slot(opened)
        await left.wait()

    between(make_one_sided, test)


def test_writers_beyond_those_that_may_be_attached_are_refused_while_all_of_these_write(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "MAX_GUESTS", 1)

    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        mine, other, late = receiver.lease(1000), receiver.lease(1000), fabric.open("encoder/1")
        await writer.open_slot(mine, seconds=30)
        with pytest.raises(TransferError, match="1 writers are attached already"):
            await late.write(other, [Piece(rubbish(1000), 0)], seconds=30)
        await writer.write(mine, [Piece(rubbish(1000), 0)], seconds=30)
        await late.write(other, [Piece(rubbish(1000), 0)], seconds=30)
        with pytest.raises(PeerGone):  # it was idle, and is forgotten
            await writer.write(mine, [Piece(rubbish(1000), 0)], seconds=30)
        await writer.write(mine, [Piece(rubbish(1000), 0)], seconds=30)
        await late.close()

    between(make_one_sided, test)


def test_bytes_of_a_dead_writer_may_still_be_on_their_way(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a transport says for how long, its slot is nobody's until then."""
    monkeypatch.setattr(ShmMover, "settle_seconds", 3600.0)

    async def work() -> None:
        fabric = OverShm(sockets)
        receiver, writer = Receiver(fabric), fabric.open("encoder/0")
        assert isinstance(receiver.transport, OneSidedTransport)
        guests, lease = receiver.transport._guests, receiver.lease(1000)
        await writer.open_slot(lease, seconds=30)
        receiver.pool.release(lease.lease)
        (sender,) = guests._guests
        guests._died(sender)
        (timer,) = guests._timers
        assert timer.when() > asyncio.get_running_loop().time() + 3000
        assert receiver.pool.quarantined_bytes == 1000
        await writer.close()
        await receiver.transport.close()

    run(work())


def test_where_bytes_travel_there_is_no_slot_to_open(make_messaging: Callable[[], Messaging]) -> None:
    async def test(_: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(8)
        assert await writer.open_slot(lease, seconds=30) is None
        writer.drop_slot(lease)

    between(make_messaging, test)


def test_two_writers_are_never_in_one_slot(make_one_sided: Callable[[], Fabric]) -> None:
    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        lease = receiver.lease(1000)
        receiver.pool.enter(lease.lease, lease.generation, "encoder/7.1")
        with pytest.raises(SlotBusy, match=r"encoder/7\.1 has not stopped"):
            await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
        receiver.pool.leave(lease.lease, "encoder/7.1")
        await writer.write(lease, [Piece(rubbish(1000), 0)], seconds=30)

    between(make_one_sided, test)


def test_a_checksum_goes_along_and_is_verified(
    make_fabric: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(fabric: Fabric, receiver: Receiver, _: Transport) -> None:
        careful = fabric.open("encoder/1", checksum=True)
        try:
            good, bad = receiver.lease(5000), receiver.lease(5000)
            await careful.write(good, [Piece(rubbish(5000)[:77], 0), Piece(rubbish(5000)[77:], 0, 77)], seconds=30)
            assert torch.equal(receiver.held(good), rubbish(5000))
            monkeypatch.setattr(landing, "sums_of", lambda pieces: [1] * len(pieces))
            with pytest.raises(TransferError, match="have the checksum"):
                await careful.write(bad, [Piece(rubbish(5000), 0)], seconds=30)
            receiver.pool.filled(good.lease, good.generation)
        finally:
            await careful.close()

    between(make_fabric, test)


@pytest.mark.parametrize("kind", [OverZmq, OverShm])
def test_a_checksum_is_computed_beside_the_loop(
    kind: Callable[[Path], Fabric], sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work: list[threading.Thread] = []
    real = landing.sums_of

    def seen(pieces: Sequence[Piece]) -> list[int]:
        at_work.append(threading.current_thread())
        return real(pieces)

    monkeypatch.setattr(landing, "sums_of", seen)

    async def test(fabric: Fabric, receiver: Receiver, _: Transport) -> None:
        careful = fabric.open("encoder/1", checksum=True)
        await careful.write(receiver.lease(1000), [Piece(rubbish(1000), 0)], seconds=30)
        await careful.close()
        assert at_work
        assert threading.current_thread() not in at_work

    between(lambda: kind(sockets), test)


class Slow:
    """A verifier that takes until it is let go."""

    def __init__(self, verdict: Exception | None = None) -> None:
        self.verdict = verdict
        self.began, self.let_go = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.began.set()
        assert self.let_go.wait(60)
        if self.verdict is not None:
            raise self.verdict


@pytest.mark.parametrize("verdict", [None, landing.Refusal("checksum", "they have the checksum 0")])
def test_bytes_are_verified_beside_the_loop_and_read_by_nobody_before(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch, verdict: Exception | None
) -> None:
    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        careful, slow = fabric.open("encoder/1", checksum=True), Slow(verdict)
        monkeypatch.setattr(guests, "verify", slow)
        try:
            mine, other = receiver.lease(1000), receiver.lease(1000)
            write = asyncio.create_task(careful.write(mine, [Piece(rubbish(1000), 0)], seconds=30))
            await asyncio.to_thread(slow.began.wait, 30)
            await writer.write(other, [Piece(rubbish(1000), 0)], seconds=30)  # the loop goes on meanwhile
            assert not write.done()
            with pytest.raises(SlotBusy, match="still writing"):
                receiver.pool.filled(mine.lease, mine.generation)
            slow.let_go.set()
            if verdict is None:
                await write
                receiver.pool.filled(mine.lease, mine.generation)
            else:
                with pytest.raises(TransferError, match="the checksum 0"):
                    await write
        finally:
            slow.let_go.set()
            await careful.close()

    between(make_one_sided, test)


def test_bytes_that_cannot_be_verified_are_told_and_leave_nothing_behind(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    async def test(fabric: Fabric, receiver: Receiver, writer: Transport) -> None:
        careful = fabric.open("encoder/1", checksum=True)
        monkeypatch.setattr(guests, "verify", fail)
        try:
            lease = receiver.lease(1000)
            with pytest.raises(TransferError, match="could not be verified: RuntimeError: CUDA out of memory"):
                await careful.write(lease, [Piece(rubbish(1000), 0)], seconds=30)
            receiver.pool.release(lease.lease)
            assert receiver.pool.quarantined_bytes == 0
        finally:
            await careful.close()

    between(make_one_sided, test)


def test_a_lease_that_ends_while_its_bytes_are_verified_is_quarantined_until_then(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(fabric: Fabric, receiver: Receiver, _: Transport) -> None:
        careful, slow = fabric.open("encoder/1", checksum=True), Slow()
        monkeypatch.setattr(guests, "verify", slow)
        try:
            lease = receiver.lease(1000)
            write = asyncio.create_task(careful.write(lease, [Piece(rubbish(1000), 0)], seconds=30))
            await asyncio.to_thread(slow.began.wait, 30)
            receiver.pool.release(lease.lease)
            assert receiver.pool.quarantined_bytes == 1000
            slow.let_go.set()
            with pytest.raises(StaleGeneration):
                await write
            assert receiver.pool.quarantined_bytes == 0
        finally:
            slow.let_go.set()
            await careful.close()

    between(make_one_sided, test)


def test_writes_beyond_those_that_may_wait_to_be_verified_are_refused(
    make_one_sided: Callable[[], Fabric], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "MAX_CHECKS", 0)

    async def test(fabric: Fabric, receiver: Receiver, _: Transport) -> None:
        careful = fabric.open("encoder/1", checksum=True)
        with pytest.raises(TransferError, match="wait to be verified"):
            await careful.write(receiver.lease(1000), [Piece(rubbish(1000), 0)], seconds=30)
        await careful.close()

    between(make_one_sided, test)


def test_a_pool_beyond_this_host_is_refused_before_a_page_of_it_is_touched(make_fabric: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, __: Transport) -> None:
        with pytest.raises(RegistrationFailed, match="of this host's memory are left"):
            receiver.transport.allocate(psutil.virtual_memory().total * 2, torch.device("cpu"))

    between(make_fabric, test)


def test_the_memory_of_a_pool_must_come_from_its_transport(make_one_sided: Callable[[], Fabric]) -> None:
    async def test(_: Fabric, receiver: Receiver, __: Transport) -> None:
        foreign = Pool("kv", torch.empty(512, dtype=torch.uint8), RangeAllocator(512))
        with pytest.raises(RegistrationFailed, match="not allocated by this transport"):
            receiver.transport.register(foreign)

    between(make_one_sided, test)


def test_a_stranger_is_told_nothing_and_let_in_nowhere(make_one_sided: Callable[[], Fabric]) -> None:
    """Without the token there is no address; without having attached to this very process there is no write."""

    async def test(_: Fabric, receiver: Receiver, __: Transport) -> None:
        lease, answers = receiver.lease(1000), Facts()
        link: Link[HostToGuest, GuestToHost] = Link(
            receiver.address.endpoint, HOST_TO_GUEST, GUEST_TO_HOST, lambda answer, _: answers.add(answer)
        )
        name = RankName("encoder/0")
        link.send(
            Attach(token="guess", rank=name, incarnation=Incarnation(1), pid=os.getpid(), born=birth(os.getpid()))
        )
        link.send(begin(lease, 0))
        link.send(
            Attach(token="secret", rank=name, incarnation=Incarnation(1), pid=os.getpid(), born=birth(os.getpid()))
        )
        link.send(begin(lease, 0))
        link.send(End(write=1, landed=True))
        seen = await answers.count(5)
        kinds = [answer.kind if isinstance(answer, Rejected) else type(answer).__name__ for answer in seen]
        assert kinds == ["token", "stranger", "Attached", "stranger", "stranger"]
        attached = seen[2]
        link.send(begin(lease, attached.session))
        link.send(begin(lease, attached.session))
        link.send(End(write=1, landed=True))
        await answers.count(8)
        kinds = [answer.kind if isinstance(answer, Rejected) else type(answer).__name__ for answer in seen[5:]]
        assert kinds == ["Admitted", "frames", "Landed"]
        link.close()

    between(make_one_sided, test)


@pytest.mark.parametrize("pid", [-1, 0, 1 << 22, 1 << 40])
def test_a_writer_whose_process_is_none_is_not_let_in(make_one_sided: Callable[[], Fabric], pid: int) -> None:
    """Its death could not be seen. No process has a number as high as 1 << 22."""

    async def test(_: Fabric, receiver: Receiver, __: Transport) -> None:
        answers = Facts()
        link: Link[HostToGuest, GuestToHost] = Link(
            receiver.address.endpoint, HOST_TO_GUEST, GUEST_TO_HOST, lambda answer, _: answers.add(answer)
        )
        link.send(Attach(token="secret", rank=RankName("encoder/0"), incarnation=Incarnation(1), pid=pid, born=1))
        (answer,) = await answers.count(1)
        assert answer.kind == "gone"
        link.close()

    between(make_one_sided, test)


def begin(lease: RemoteLease, session: int) -> Begin:
    return Begin(write=1, session=session, pool=lease.pool.pool, lease=lease.lease, generation=lease.generation)
