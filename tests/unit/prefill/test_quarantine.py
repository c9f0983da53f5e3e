"""Ranks whose memory others still write to when a request ends: a client that leaves, or a neighbour that dies, ends no
rank; only what stays in quarantine for long does.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from epdctl.transfer.pool import GRACE_SECONDS, QUARANTINE_PART, Pool
from epdctl.wire.lifecycle import FatalKind
from epdctl.wire.serve import Granted
from epdctl.wire.transfer import RemoteLease
from tests.support.beating import beating
from tests.support.halfway import Halfway
from tests.support.language_ranks import Pair, Question, Setup, alone, item, pair, run, until
from tests.support.transfer_ends import encoded, pattern, settle, writing

PICTURE = Question(tokens=tuple(range(10, 30)), items=[item(0, 2, 8)])
TEXT = Question(tokens=tuple(range(10, 30)), max_tokens=12)
NEXT = Question(tokens=tuple(range(50, 60)), items=[item(0, 2, 2)], name="next", room=8)


def too_much(pool: Pool) -> bool:
    """Of it waits for writers."""
    return pool.quarantined_bytes * QUARANTINE_PART > pool.memory.numel()


def slots(ranks: Pair) -> Pool:
    pool: Pool = ranks.prefill.service._slots  # type: ignore[attr-defined]
    return pool


def kv(ranks: Pair) -> Pool:
    pool: Pool = ranks.decode.service._kv  # type: ignore[attr-defined]
    return pool


async def abandoned(ranks: Pair) -> RemoteLease:
    """Half of the embedding pool, opened by an encoder that is at work when the client leaves."""
    ranks.ask(PICTURE)
    granted = await ranks.gateway.hear(Granted)
    assert await ranks.encoder.transport.open_slot(granted.slots[0], seconds=30) is not None
    ranks.abort(PICTURE)
    await until(lambda: too_much(slots(ranks)))
    return granted.slots[0]


def test_a_client_that_leaves_while_its_picture_is_encoded_ends_no_rank() -> None:
    async def scene() -> None:
        async with pair(Setup(backend="shm", embedding_bytes=256)) as ranks:
            service = ranks.prefill.service
            async with beating(service._spec, service) as process:
                slot = await abandoned(ranks)
                await process.beats()
                assert too_much(slots(ranks))
                ranks.encoder.transport.drop_slot(slot)
                await until(lambda: not slots(ranks).quarantined_bytes)
                await process.beats()
            assert await ranks.answer(NEXT) == alone(NEXT)
            await ranks.idle()

    run(scene())


def test_a_writer_that_never_says_that_it_stopped_ends_the_rank_in_the_end() -> None:
    async def scene() -> None:
        async with pair(Setup(backend="shm", embedding_bytes=256)) as ranks:
            service = ranks.prefill.service
            async with beating(service._spec, service) as process:
                await abandoned(ranks)
                await process.beats()
                pool = slots(ranks)
                pool._since = {lease: since - GRACE_SECONDS for lease, since in pool._since.items()}
                last = await process.leaves()
                assert (last.kind, last.restartable) == (FatalKind.CRASH, True)
                assert "128 of 256 bytes of the embeddings pool are quarantined for more than 30 s" in last.text

    run(scene())


@pytest.mark.parametrize("backend", ["shm", "mooncake"])
def test_a_client_that_leaves_while_its_pages_are_written_ends_no_rank(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    gate = Halfway(backend, monkeypatch.setattr)

    async def scene() -> None:
        async with pair(Setup(backend=backend), Setup(backend=backend, pages=16)) as ranks:
            service = ranks.decode.service
            async with beating(service._spec, service) as process:
                gate.arm()
                ranks.ask(TEXT)
                await until(gate.reached.is_set)
                ranks.abort(TEXT)
                await until(lambda: too_much(kv(ranks)))
                await process.beats()
                assert too_much(kv(ranks))
                gate.let_go()
                await ranks.idle()
                await process.beats()
            assert await ranks.answer(NEXT) == alone(NEXT)
            await ranks.idle()

    run(scene())


def test_a_prefill_rank_that_dies_in_the_middle_of_its_pages_does_not_take_decode_along(
    sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when the lease had long ended by then: what the dead one sent is waited for from its death on."""
    pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    settle(3600.0, monkeypatch.setitem)

    async def scene() -> None:
        async with pair(Setup(backend="mooncake"), Setup(backend="mooncake", pages=16)) as ranks:
            service, pool = ranks.decode.service, kv(ranks)
            lease = pool.lease(8, "room", seconds=60)
            with writing("mooncake", sockets, "prefill/7") as other:
                remote = lease.remote(service._addresses["kv"])
                page = lease.extents[0].nbytes
                assert await other.ask("half", encoded(remote), page, 1)
                async with beating(service._spec, service) as process:
                    pool.release(lease.id)
                    assert too_much(pool)
                    await process.beats()
                    born = pool._since[lease.id] = pool._since[lease.id] - GRACE_SECONDS + 5
                    await asyncio.to_thread(other.kill)
                    await until(lambda: pool._since[lease.id] > born)
                    pool._since[lease.id] -= GRACE_SECONDS - 5
                    await process.beats()
                    assert too_much(pool)
            start = lease.extents[0].offset
            assert pool.memory[start : start + page // 2].equal(pattern(page, 1)[: page // 2])
            for inside in list(pool._writers[lease.id]):
                pool.leave(lease.id, inside)

    run(scene())
