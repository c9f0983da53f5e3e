"""The pure parts: the table of states, the choice of ranks, the door, pictures' headers."""

from __future__ import annotations

import asyncio
import io
import json
from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.types import Message

from epdctl.errors import RequestError
from epdctl.families.base import PictureHeader
from epdctl.gateway.balance import Load, choose
from epdctl.gateway.budget import Door
from epdctl.gateway.http import Speaker
from epdctl.gateway.states import ENDED, TABLE, IllegalStep, RequestState, Step, advance
from epdctl.ids import Modality, RankName
from epdctl.rank.media import Medium, Source, read
from epdctl.wire.config import Limits
from tests.unit.gateway.harness import data_url, picture


def decode(*pending: int) -> list[Load]:
    return [Load(RankName(f"decode/{number}"), count) for number, count in enumerate(pending)]


# -- states --


def test_every_state_is_in_the_table_and_every_end_is_one() -> None:
    assert set(TABLE) == set(RequestState)
    assert {state for state, steps in TABLE.items() if not steps} == ENDED


@pytest.mark.parametrize(("state", "step"), list(product(RequestState, Step)))
def test_a_step_is_in_the_table_or_illegal(state: RequestState, step: Step) -> None:
    if step in TABLE[state]:
        assert advance(state, step) in RequestState
    else:
        with pytest.raises(IllegalStep):
            advance(state, step)


def test_every_open_state_can_end_and_every_placed_one_can_be_lost() -> None:
    for state in set(RequestState) - ENDED:
        assert {advance(state, step) for step in (Step.FINISH, Step.ABORT, Step.FAIL)} == ENDED
        if state is not RequestState.RECEIVED:
            assert advance(state, Step.LOST) is RequestState.RECEIVED


# -- balance --


def test_the_least_loaded_rank_is_chosen() -> None:
    assert choose(decode(2, 1, 3)) == "decode/1"
    assert choose([]) is None


def test_ties_go_round() -> None:
    last, order = None, []
    for _ in range(4):
        last = choose(decode(0, 0, 0), after=last)
        order.append(last)
    assert order == ["decode/0", "decode/1", "decode/2", "decode/0"]


def test_ten_comes_after_nine() -> None:
    assert choose(decode(*[0] * 11), after=RankName("decode/9")) == "decode/10"


def test_avoided_ranks_are_the_last_resort() -> None:
    assert choose(decode(0, 9), avoid={RankName("decode/0")}) == "decode/1"
    assert choose(decode(0), avoid={RankName("decode/0")}) == "decode/0"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 6))
def test_the_chosen_one_is_always_a_least_loaded_one(pending: list[int], after: int) -> None:
    chosen = choose(decode(*pending), after=RankName(f"decode/{after}"))
    assert chosen is not None
    assert pending[chosen.replica] == min(pending)


# -- the door --


def limits(**changes: int) -> Limits:
    return msgspec.structs.replace(Limits(), **changes)


def test_the_door_counts_and_says_when_it_is_idle() -> None:
    async def scene() -> None:
        door = Door(limits(inflight=1, queue=1, media_bytes=100), 1)
        first, second = door.enter(), door.enter()
        with pytest.raises(RequestError, match=r"2 requests are open; 1 .* \(limits.inflight\) and 1 wait") as full:
            door.enter()
        assert (full.value.status, full.value.retry_after) == (429, 1)
        first.hold(60)
        with pytest.raises(RequestError) as heavy:
            second.hold(41)
        assert heavy.value.status == 429
        assert door.held_bytes == 60
        first.hold(10)
        second.hold(90)
        assert not door.idle.is_set()
        with pytest.raises(AssertionError):
            door.check()
        second.keep()  # a job of its own is still at work
        for ticket in (first, second):
            ticket.give_back()
        assert (door.open_tickets, door.held_bytes) == (1, 90)
        second.give_back()
        door.check()
        door.closed = "closed"
        with pytest.raises(RequestError) as closed:
            door.enter()
        assert closed.value.status == 503

    asyncio.run(scene())


@pytest.mark.parametrize(("inflight", "queue", "ranks", "capacity"), [(4, 0, 1, 4), (4, 3, 1, 7), (4, 3, 5, 23)])
def test_those_that_wait_are_counted_beyond_those_in_flight(
    inflight: int, queue: int, ranks: int, capacity: int
) -> None:
    async def scene() -> None:
        door = Door(limits(inflight=inflight, queue=queue), ranks)
        tickets = [door.enter() for _ in range(capacity)]
        with pytest.raises(RequestError, match="at once"):
            door.enter()
        for ticket in tickets:
            ticket.give_back()
        door.check()

    asyncio.run(scene())


# -- pictures --


def read_picture(url: str) -> Medium:
    return read(Source(Modality.IMAGE, "here", url), Limits())


def turned(orientation: int, form: str) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(buffer, form, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_measured_upright(form: str, orientation: int) -> None:
    medium = read_picture(data_url(turned(orientation, form)))
    assert medium.header == (PictureHeader(20, 40) if orientation > 4 else PictureHeader(40, 20))


def test_no_pixel_is_decoded() -> None:
    """A picture cut off after its header has a size; the encoder will say what is wrong with the rest."""
    data = picture(640, 480)
    medium = read_picture(data_url(data[: len(data) // 2]))
    assert medium.header == PictureHeader(640, 480)


def test_a_bomb_is_refused_by_its_header() -> None:
    header = bytearray(picture(10, 10, form="BMP"))
    header[18:26] = (30_000).to_bytes(4, "little") + (30_000).to_bytes(4, "little")
    with pytest.raises(RequestError, match="too many pixels"):
        read_picture(data_url(bytes(header)))


def test_the_hash_is_of_the_bytes() -> None:
    first, second = (read_picture(data_url(picture(colour=colour))) for colour in ("red", "blue"))
    assert first.content_hash != second.content_hash
    assert len(first.content_hash) == 32
    assert first == read_picture(data_url(picture(colour="red"), "image/jpeg"))


@given(
    st.binary(max_size=200),
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b""]),
)
def test_any_bytes_are_a_picture_or_a_400(data: bytes, start: bytes) -> None:
    try:
        found: Medium | None = read_picture(data_url(start + data))
    except RequestError as error:
        found = None
        refused = error.status, error.param
    assert found or refused == (400, "here")


# -- what goes out --


def test_an_event_holds_nothing_that_a_client_may_take_for_an_end_of_line() -> None:
    text = "a\u2028b\u2029c\x85d\ne"

    async def scene() -> bytes:
        sent: list[bytes] = []

        async def send(message: Message) -> None:
            sent.append(message["body"])

        await Speaker(send).event(json.dumps({"text": text}, ensure_ascii=False).encode())
        return b"".join(sent)

    event = asyncio.run(scene()).decode()
    (line, *rest) = event.splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == {"text": text}
