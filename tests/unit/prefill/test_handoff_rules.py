"""Which pages go when, whether decode's lease fits, and what a failed write means."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epdctl.errors import DeadlineExceeded, LeaseExpired, PeerGone, StaleGeneration, TransferError, WireError
from epdctl.ids import Incarnation, RankName, RequestId, Room
from epdctl.prefill.handoff import Outgoing, misfit, why_not_written
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
    assert f"decode/0 leased {pages} pages of [{nbytes}] bytes; the prompt has 3 of {LAYOUT.page_bytes}" in refusal.text


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
