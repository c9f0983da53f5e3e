"""What becomes of requests whose ranks die with them, leave in order, or will never be there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from epdctl.ids import Incarnation, RankName
from epdctl.wire.encode import Encode, FailureKind
from epdctl.wire.lifecycle import Absent
from epdctl.wire.serve import RANK_TO_GATEWAY, Decode, Failed, Prefill, RankRef
from tests.unit.gateway.harness import EPD, House, ask, house, image_part, picture
from tests.unit.gateway.test_failures import Reader, count, reading

PICTURE = [image_part(picture())]


def absent(rank: str, incarnation: int = 1, *, died: bool = False, hopeless: str | None = None) -> Absent:
    name = RankName(rank)
    return Absent(rank=name, stage=name.stage, incarnation=Incarnation(incarnation), died=died, hopeless=hopeless)


def dies(home: House, rank: str) -> None:
    """As the supervisor tells it: why, and then that it is gone."""
    home.service.absent_changed([absent(rank, home.cluster[rank].incarnation, died=True)])
    home.cluster.kill(rank)


async def takes_one(home: House, rank: str) -> None:
    """A new incarnation that takes a request and says nothing."""
    (made,) = home.cluster.up(rank)
    made.script.mute = True
    await made.hears(Prefill if rank.startswith("prefill") else Decode)


# -- ranks that die --


@pytest.mark.parametrize("victim", ["decode/0", "prefill/0"])
def test_a_request_that_its_ranks_die_with_is_given_up_after_the_second(victim: str) -> None:
    async def scene() -> None:
        async with house(*[rank for rank in EPD if rank != victim]) as home:
            asking = asyncio.create_task(home.chat(**ask("fatal")))
            for _ in range(2):
                await takes_one(home, victim)
                dies(home, victim)
            response = await asking
            assert (response.status_code, response.json()["error"]["code"]) == (502, "rank_lost")
            assert f"{victim} (incarnation 1), {victim} (incarnation 2)" in response.json()["error"]["message"]
            assert count(home, "epdctl_requests_given_up_total") == 1
            (third,) = home.cluster.up(victim)
            await home.text(**ask("harmless"))
            assert len(third.all(Prefill)) + len(third.all(Decode)) == 1, "only the harmless one"
            await home.idle()

    asyncio.run(scene())


def test_one_death_is_bad_luck_for_everybody_who_was_there() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster["decode/0"].script.mute = True
            asking = [asyncio.create_task(home.text(**ask("innocent"))) for _ in range(4)]
            await home.cluster["decode/0"].hears(Decode, 4)
            dies(home, "decode/0")
            home.cluster.up("decode/0")
            assert len(set(await asyncio.gather(*asking))) == 1
            await home.idle()

    asyncio.run(scene())


def test_ranks_that_were_only_withdrawn_are_not_counted() -> None:
    async def scene() -> None:
        async with house(*[rank for rank in EPD if rank != "decode/0"]) as home:
            asking = asyncio.create_task(home.text(**ask("patient")))
            for _ in range(3):
                await takes_one(home, "decode/0")
                home.cluster.kill("decode/0")
            home.cluster.up("decode/0")
            assert await asking
            assert count(home, "epdctl_attempts_lost_total", stage="decode") == 3
            await home.idle()

    asyncio.run(scene())


def test_a_death_counts_although_a_neighbour_was_the_first_to_tell() -> None:
    """Prefill noticed that decode was gone, and the supervisor says only later that it died."""

    async def scene() -> None:
        async with house(*EPD, "decode/1") as home:
            for name in ("prefill/0", "decode/0", "decode/1"):
                home.cluster[name].script.mute = True
            asking = asyncio.create_task(home.chat(**ask("fatal")))
            prefill = home.cluster["prefill/0"]
            await prefill.hears(Prefill)
            first = prefill.all(Prefill)[0]
            text = f"{first.decode_at.rank} went away"
            failed = Failed(request=first.request, attempt=first.attempt, kind=FailureKind.RANK_LOST, text=text)
            prefill.inbox.reply(prefill.senders[0], failed, RANK_TO_GATEWAY)
            second = (await prefill.hears(Prefill, 2))[1]
            assert second.decode_at.rank != first.decode_at.rank
            dies(home, first.decode_at.rank)
            assert not asking.done()
            dies(home, second.decode_at.rank)
            assert (await asking).status_code == 502
            await home.idle()

    asyncio.run(scene())


def test_encoders_that_die_with_a_picture_count() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            router = home.cluster["encoder-router/0"]
            router.script.fail = FailureKind.RANK_LOST
            router.script.lost = [RankRef(rank=RankName(f"encoder/{n}"), incarnation=Incarnation(1)) for n in (0, 1)]
            home.service.absent_changed([absent("encoder/0", died=True), absent("encoder/1", died=True)])
            response = await home.chat(**ask(PICTURE))
            assert (response.status_code, response.json()["error"]["code"]) == (502, "rank_lost")
            assert len(router.all(Encode)) == 1
            await home.idle()

    asyncio.run(scene())


# -- ranks that leave in order --


def test_an_answer_is_not_resumed_when_its_rank_only_leaves() -> None:
    question = ask("long", max_tokens=30)

    async def scene() -> None:
        async with house(*EPD) as home:
            leaving = home.cluster["decode/0"]
            leaving.script.stop_after = 7
            async with reading(home, **question) as reader:
                await reader.until(7)
                leaving.script.leaving = True
                home.cluster.up("decode/1")
                await home.text(**ask("another"))
                assert len(leaving.all(Decode)) == 1, "it is given nothing new"
                assert isinstance(reader, Reader)
                getattr(leaving, "go_on")()  # noqa: B009
                await reader.rest()
                assert reader.chunks[-2]["resumes"] == 0
            assert count(home, "epdctl_attempts_lost_total", stage="decode") == 0
            await home.idle()

    asyncio.run(scene())


@pytest.mark.parametrize("rank", EPD)
def test_the_only_rank_of_a_stage_that_leaves_is_a_missing_one(rank: str) -> None:
    async def scene() -> None:
        async with house(*EPD, wait_seconds=0.01) as home:
            home.cluster[rank].script.leaving = True
            home.cluster.publish()
            response = await home.chat(**ask(PICTURE))
            assert response.status_code == 503
            assert rank.split("/")[0] in response.json()["error"]["message"]
            await home.idle()

    asyncio.run(scene())


# -- ranks that will not be there --


def refused(*gone: Absent, there: Sequence[str] = (), **limits: Any) -> str:
    """What a request is told whose route is missing."""

    async def scene() -> str:
        async with house(*there, **limits) as home:
            home.service.absent_changed(gone)
            home.cluster.publish()
            response = await home.chat(**ask(PICTURE))
            await home.idle()
            assert (response.status_code, response.json()["error"]["code"]) == (503, "no_rank")
            assert "retry-after" in response.headers
            return str(response.json()["error"]["message"])

    return asyncio.run(scene())


@pytest.mark.parametrize("gone", EPD)
def test_a_stage_that_has_failed_is_told_at_once(gone: str) -> None:
    there = [rank for rank in EPD if rank != gone]
    text = refused(absent(gone, hopeless="failed: missing key x"), there=there, wait_seconds=3600)
    assert text == f"{gone} is failed: missing key x"


def test_a_stage_that_fails_while_a_request_waits_is_told_at_once() -> None:
    async def scene() -> None:
        async with house(*EPD[:3], wait_seconds=3600) as home:
            asking = asyncio.create_task(home.chat(**ask("hello?")))
            await home.open_requests(1)
            home.service.absent_changed([absent("decode/0", hopeless="stopped: stop asked for")])
            response = await asking
            assert (response.status_code, response.json()["error"]["message"]) == (
                503,
                "decode/0 is stopped: stop asked for",
            )
            await home.idle()

    asyncio.run(scene())


def test_a_rank_that_may_come_back_is_waited_for_but_not_for_ever() -> None:
    gone = (absent("decode/0", hopeless="failed: x"), absent("decode/1", died=True))
    text = refused(*gone, there=EPD[:3], wait_seconds=0.01)
    assert text == "no decode rank is ready; it waited 0.01 s (limits.wait_seconds)"


def test_one_rank_that_is_there_is_enough() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.service.absent_changed([absent("decode/1", hopeless="failed: x")])
            assert await home.text(**ask(PICTURE))
            await home.idle()

    asyncio.run(scene())
