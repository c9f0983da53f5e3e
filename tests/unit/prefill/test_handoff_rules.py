"""Which pages go when, whether decode's lease fits, and what a failed write means."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epdctl.errors import DeadlineExceeded, LeaseExpired, PeerGone, StaleGeneration, TransferError, WireError
from epdctl.ids import Incarnation, RankName, RequestId, Room
from epdctl.prefill.handoff import Outgoing, misfit, stretches, why_not_written
from epdctl.transfer.allocators import PageExtents
from epdctl.wire.encode import FailureKind
from epdctl.wire.serve import KvLayout, KvLease
from epdctl.wire.transfer import Extent, PoolAddress, RemoteLease

LAYOUT = KvLayout(page_size=16, layers=2, kv_heads=2, head_dim=8, dtype="float32")


def lease(layout: KvLayout = LAYOUT, pages: int = 3, nbytes: int = LAYOUT.page_bytes) -> KvLease:
    address = PoolAddress(
        owner=RankName("decode/0"), incarnation=Incarnation(1), pool="kv", backend="zmq", endpoint="ipc:///nowhere"
    )
    extents = [Extent(offset=page * nbytes, nbytes=nbytes) for page in range(pages)]
    remote = RemoteLease(pool=address, lease=1, generation=2, extents=extents)
    return KvLease(request=RequestId("r"), attempt=1, room=Room(1), lease=remote, layout=layout)


@given(st.integers(1, 200), st.integers(1, 32), st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_every_page_goes_once_in_order_and_whole(prompt: int, page: int, chunks: list[int]) -> None:
    outgoing = Outgoing(prompt, page)
    computed = 0
    sent: list[int] = []
    while computed < prompt:
        computed = min(prompt, computed + chunks[len(sent) % len(chunks)])
        outgoing.computed(computed)
        for place in outgoing.due():
            assert min((place + 1) * page, prompt) <= computed, "a page went before it was complete"
            sent.append(place)
        outgoing.sent = outgoing.due().stop
    assert outgoing.done
    assert sent == list(range(-(-prompt // page)))


PAGE = 64


@given(st.permutations(range(12)), st.permutations(range(12)), st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_every_page_is_moved_to_its_own_place_in_as_few_pieces_as_can_be(
    own: list[int], theirs: list[int], chunks: list[int]
) -> None:
    def bytes_of(page: int) -> list[tuple[int, int]]:
        return [(page, byte) for byte in range(0, PAGE, 16)]

    class Theirs:
        total = free = 12

        def take(self, count: int) -> list[int]:
            return theirs[:count]

        def give(self, pages: object) -> None: ...

    extents = PageExtents(Theirs(), PAGE).take(12)
    ours = [each for page in range(12) for each in bytes_of(page)]
    pool: list[tuple[int, int] | None] = [None] * len(ours)
    sent, pieces = 0, 0
    for chunk in itertools.cycle(chunks):
        due = range(sent, min(12, sent + chunk))
        for way in stretches(own, due, extents, PAGE):
            into = extents[way.extent].offset + way.offset
            assert way.offset + way.nbytes <= extents[way.extent].nbytes
            pool[into // 16 : (into + way.nbytes) // 16] = ours[way.source // 16 : (way.source + way.nbytes) // 16]
            pieces += 1
        breaks = sum(own[place] + 1 != own[place + 1] or theirs[place] + 1 != theirs[place + 1] for place in due[:-1])
        assert pieces == breaks + 1
        sent, pieces = due.stop, 0
        if sent == 12:
            break
    for place in range(12):
        start = theirs[place] * PAGE // 16
        assert pool[start : start + PAGE // 16] == bytes_of(own[place])


@pytest.mark.parametrize(
    ("change", "words"),
    [({"page_size": 32}, "page_size 16 here, 32 there"), ({"dtype": "bfloat16"}, "dtype float32 here, bfloat16 there")],
)
def test_another_layout_is_named_with_both_values(change: dict[str, object], words: str) -> None:
    refusal = misfit(LAYOUT, lease(msgspec.structs.replace(LAYOUT, **change)), 3)
    assert refusal is not None
    assert words in refusal.text


@pytest.mark.parametrize(("pages", "nbytes"), [(2, LAYOUT.page_bytes), (3, LAYOUT.page_bytes - 1)])
def test_a_lease_with_too_little_room_is_refused(pages: int, nbytes: int) -> None:
    refusal = misfit(LAYOUT, lease(pages=pages, nbytes=nbytes), 3)
    assert refusal is not None
    words = (
        f"decode/0 leased {pages * nbytes} bytes in pieces of [{nbytes}]; the prompt has 3 pages of {LAYOUT.page_bytes}"
    )
    assert words in refusal.text


def test_a_lease_that_fits_is_taken() -> None:
    assert misfit(LAYOUT, lease(pages=5), 3) is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PeerGone("x"), FailureKind.RANK_LOST),
        (StaleGeneration("x"), FailureKind.RANK_LOST),
        (LeaseExpired("x"), FailureKind.RANK_LOST),
        (DeadlineExceeded("x"), FailureKind.DEADLINE),
        (TransferError("x"), FailureKind.INTERNAL),
    ],
)
def test_what_a_failed_write_means(error: TransferError | WireError, kind: FailureKind) -> None:
    assert why_not_written(error, "decode/0").kind is kind
