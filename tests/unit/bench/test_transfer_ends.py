"""The two ends of ``epdctl bench transfer`` believe no write that they have not verified."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from epdctl.bench.digest import change, digest, total
from epdctl.bench.ends import Receiver, Writer
from epdctl.errors import TransferError
from epdctl.transfer.base import Piece, Transport
from epdctl.transfer.onesided import OneSidedTransport
from epdctl.wire.transfer import RemoteLease

PAGE, SIZE = 8192, 65536
PLAIN = {"backend": "shm", "protocol": "", "gpu": False, "tcp": False, "token": "secret", "page": 0, "run": 1}
ROUNDS = {"rounds": 3, "sum": True, "opened": False, "in_place": False, "pooled": False}


def rubbish(words: int = SIZE // 8) -> torch.Tensor:
    made = torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(0))
    return made.view(torch.uint8)


def test_a_digest_knows_the_place_of_every_word() -> None:
    data = rubbish()
    swapped = data.view(torch.int64).clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    pages = data.view(-1, PAGE).flip(0).contiguous().view(-1)
    assert total([data]) == total([pages]) == total([swapped.view(torch.uint8)]), "why a sum is not enough"
    assert len({digest([each]) for each in (data, pages, swapped.view(torch.uint8))}) == 3
    parts = data.split(PAGE)  # type: ignore[no-untyped-call]
    assert digest(parts) != digest(reversed(parts)) != digest([*parts[1:], parts[0]])


def test_a_change_leaves_no_page_as_it_was() -> None:
    data = rubbish()
    before = data.clone()
    change(data)
    assert (data.view(-1, 4096) != before.view(-1, 4096)).any(dim=1).all()


class Forgetful:
    """A transport that says of the writes after the first few that they have landed."""

    def __init__(self, real: Transport, good: int) -> None:
        self._real = real
        self._good = good

    async def write(self, lease: RemoteLease, pieces: Sequence[Piece], *, seconds: float) -> None:
        self._good -= 1
        if self._good >= 0:
            await self._real.write(lease, pieces, seconds=seconds)

    async def open_slot(self, lease: RemoteLease, *, seconds: float) -> torch.Tensor | None:
        return torch.empty(lease.extents[0].nbytes, dtype=torch.uint8)  # it is not the slot

    async def close(self) -> None:
        await self._real.close()


def measured(sockets: Path, forget_after: int | None = None, **order: Any) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        common = PLAIN | {"sockets": str(sockets), "sizes": [SIZE]} | order
        receiver = Receiver(common)
        opened = receiver.open(common)
        writer = Writer(common | {"notify": opened["notify"]})
        if forget_after is not None:
            writer._transport = Forgetful(writer._transport, forget_after)  # type: ignore[assignment]
        try:
            return await writer.measure(ROUNDS | {"lease": opened["leases"][0]["lease"], "bytes": SIZE} | order)
        finally:
            await writer.close()
            await receiver.close()

    return asyncio.run(asyncio.wait_for(work(), 60))


WAYS: list[dict[str, Any]] = [
    {},
    {"opened": True},
    {"backend": "zmq"},
    {"backend": "zmq", "tcp": True},
    {"page": PAGE, "pooled": True},
    {"page": PAGE, "pooled": True, "run": 3},
]


@pytest.mark.parametrize("way", WAYS)
def test_every_round_of_every_way_is_timed_and_verified(sockets: Path, way: dict[str, Any]) -> None:
    found = measured(sockets, **way)
    assert all(seconds > 0 for seconds in (*found["written"], *found["summed"]))
    assert len(found["written"]) == len(found["summed"]) == 3


def test_what_was_made_in_its_slot_is_verified_too(sockets: Path) -> None:
    assert len(measured(sockets, in_place=True)["written"]) == 3
    with pytest.raises(TransferError, match="not what was sent"):
        measured(sockets, in_place=True, forget_after=0)


@pytest.mark.parametrize("good", [0, 3, 7])  # of 8 writes in four rounds
def test_a_write_that_did_not_land_is_found_in_whichever_round(sockets: Path, good: int) -> None:
    with pytest.raises(TransferError, match="not what was sent"):
        measured(sockets, forget_after=good)


def test_pages_that_changed_places_are_found(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OneSidedTransport.write

    async def mixed_up(self: OneSidedTransport, lease: RemoteLease, pieces: Sequence[Piece], *, seconds: float) -> None:
        turned = [Piece(other.data, piece.extent) for piece, other in zip(pieces, reversed(pieces), strict=True)]
        await real(self, lease, turned, seconds=seconds)

    monkeypatch.setattr(OneSidedTransport, "write", mixed_up)
    with pytest.raises(TransferError, match="not what was sent"):
        measured(sockets, page=PAGE, pooled=True)
