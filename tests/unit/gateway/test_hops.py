"""What the gateway notes of requests while a capture runs: their states, by request and attempt."""

from __future__ import annotations

import asyncio

import pytest

from epdctl.wire.serve import Decode
from epdctl.wire.trace import Hop, Kind
from tests.unit.gateway.harness import EPD, LANGUAGE, House, ask, house, image_part, picture

RED = picture(56, 56, "red")


def hops_of(home: House) -> list[Hop]:
    return home.service.hops.stop().hops


def names(hops: list[Hop]) -> list[str]:
    """Without ``encoding`` and ``prefilling``, whose border two sockets race for."""
    return [hop.name for hop in hops if hop.name not in ("encoding", "prefilling")]


@pytest.mark.parametrize(
    ("ranks", "after"),
    [(EPD, ["handoff", "decoding"]), (LANGUAGE, ["decoding"])],
    ids=["epd", "language"],
)
def test_a_request_is_noted_state_by_state_without_a_gap(ranks: tuple[str, ...], after: list[str]) -> None:
    async def scene() -> None:
        async with house(*ranks) as home:
            home.service.hops.start()
            await home.text(**ask([image_part(RED)]))
            await home.idle()
            hops = hops_of(home)
            assert names(hops) == ["intake", "received", *after, "closing"]
            assert "encoding" in [hop.name for hop in hops]
            assert {(hop.kind, hop.attempt, hop.inner) for hop in hops} == {(Kind.REQUEST, 1, False)}
            assert len({hop.request for hop in hops}) == 1
            assert [hop.ended for hop in hops[:-1]] == [hop.began for hop in hops[1:]]

    asyncio.run(scene())


def test_a_second_attempt_is_told_from_the_first() -> None:
    async def scene() -> None:
        async with house(*EPD) as home:
            home.cluster["decode/0"].script.mute = True
            home.service.hops.start()
            asking = asyncio.create_task(home.text(**ask("text")))
            await home.cluster["decode/0"].hears(Decode)
            home.cluster.kill("decode/0")
            home.cluster.up("decode/0")
            await asking
            await home.idle()
            hops = hops_of(home)
            received = [hop.attempt for hop in hops if hop.name == "received"]
            assert received == [1, 2]
            assert [hop.attempt for hop in hops if hop.name == "closing"] == [2]

    asyncio.run(scene())


def test_one_that_is_refused_ends_where_it_was() -> None:
    async def scene() -> None:
        async with house(*LANGUAGE) as home:
            home.service.hops.start()
            refused = await home.chat(**ask("text", temperature="hot"))
            assert refused.status_code == 400
            await home.idle()
            assert [hop.name for hop in hops_of(home)] == ["intake"]

    asyncio.run(scene())
