"""Ranks that were given up while they were only slow: what they had been asked for ends with that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from epdctl.ids import Room, Stage
from epdctl.wire.encode import FailureKind
from epdctl.wire.lifecycle import Peer
from epdctl.wire.serve import Decode, Failed, Finished, Granted, Prefill
from tests.support.language_ranks import Pair, Question, Rank, item, pair, run, single, until

WITH_PICTURE = Question(items=[item(0, 2, 3)])


async def waiting(duo: Pair) -> None:
    """The prompt waits for its picture, decode for the prompt: either holds memory."""
    duo.ask(WITH_PICTURE)
    await duo.gateway.hear(Granted)
    assert (duo.prefill.service.pulse().inflight, duo.decode.service.pulse().inflight) == (1, 1)


def without(rank: Rank, duo: Pair) -> list[Peer]:
    return [each.peer for each in (duo.prefill, duo.decode) if each is not rank]


def back_again(rank: Rank, duo: Pair) -> list[Peer]:
    return [*without(rank, duo), msgspec.structs.replace(rank.peer, epoch=rank.peer.epoch + 1)]


def test_a_decode_rank_that_only_was_slow_hears_from_prefill_that_its_rooms_are_over() -> None:
    """It stood still when it was withdrawn: it knows of nothing, and nobody else has a link to it."""

    async def test() -> None:
        async with pair() as duo:
            await waiting(duo)
            duo.prefill.service.peers_changed(without(duo.decode, duo))
            await duo.idle()

    run(test())


def test_a_lease_without_its_prompt_is_sent_back_to_a_decode_rank_that_was_withdrawn() -> None:
    async def test() -> None:
        async with pair() as duo:
            duo.send_decode(WITH_PICTURE)
            await until(lambda: bool(getattr(duo.prefill.service, "_early")))  # noqa: B009
            duo.prefill.service.peers_changed(without(duo.decode, duo))
            await duo.decode.idle()

    run(test())


@pytest.mark.parametrize("stage", [Stage.PREFILL, Stage.DECODE])
@pytest.mark.parametrize("news", [without, back_again], ids=["missing", "another-epoch"])
def test_a_rank_that_finds_itself_withdrawn_gives_up_what_it_had(stage: Stage, news: object) -> None:
    async def test() -> None:
        async with pair() as duo:
            await waiting(duo)
            rank = duo.prefill if stage is Stage.PREFILL else duo.decode
            assert callable(news)
            peers: Sequence[Peer] = news(rank, duo)
            rank.service.peers_changed(peers)
            end = await duo.gateway.outcome()
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            await duo.idle()
            duo.world.tell_peers()
            again = Question(name="r2", room=8)
            assert len(await duo.answer(again)) == again.max_tokens

    run(test())


@pytest.mark.parametrize("stage", [Stage.PREFILL, Stage.DECODE])
def test_what_was_asked_before_and_is_read_after_is_not_taken_in(stage: Stage) -> None:
    """It lay in a socket that nobody read while the rank stood still, and nobody waits for it any more."""

    def old_and_new(duo: Pair, epoch: int, name: str) -> None:
        question = Question(name=name, room=epoch)
        common: dict[str, Any] = {
            "request": question.request,
            "attempt": 1,
            "room": Room(epoch),
            "budget_s": 60.0,
            "epoch": epoch,
        }
        if stage is Stage.DECODE:
            duo.to_decode.send(Decode(
                prompt_tokens=11, sampling=question.sampling, prefill_at=duo.prefill.ref, **common,
            ))  # fmt: skip
        else:
            duo.to_prefill.send(Prefill(
                tokens=list(question.tokens), items=[], sampling=question.sampling, decode_at=duo.decode.ref, **common,
            ))  # fmt: skip

    async def test() -> None:
        async with pair() as duo:
            rank = duo.prefill if stage is Stage.PREFILL else duo.decode
            for epoch in (1, 2):
                place = msgspec.structs.replace(rank.peer, epoch=epoch)
                rank.service.peers_changed([*without(rank, duo), place])
            old_and_new(duo, 1, "old")
            end = await duo.gateway.outcome("old")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            assert rank.service.pulse().inflight == 0
            old_and_new(duo, 2, "new")
            await until(lambda: rank.service.pulse().inflight == 1)
            rank.service.peers_changed([*without(rank, duo), place])
            assert rank.service.pulse().inflight == 1, "the same news again changes nothing"

    run(test())


def test_a_language_rank_that_finds_itself_withdrawn_gives_up_what_it_had() -> None:
    async def test() -> None:
        async with single() as solo:
            solo.rank.service.peers_changed([solo.rank.peer])
            solo.ask(WITH_PICTURE)
            await solo.gateway.hear(Granted)
            solo.rank.service.peers_changed([])
            end = await solo.gateway.outcome()
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            await solo.rank.idle()

    run(test())


@pytest.mark.parametrize("stage", [Stage.PREFILL, Stage.DECODE])
def test_what_a_leaving_rank_works_on_is_not_lost(stage: Stage) -> None:
    """It takes nothing new and stays in the table: its peers keep their links to it."""

    async def test() -> None:
        async with pair() as duo:
            await waiting(duo)
            rank = duo.prefill if stage is Stage.PREFILL else duo.decode
            leaving = msgspec.structs.replace(rank.peer, accepting=False)
            for each in (duo.prefill, duo.decode):
                each.service.peers_changed([*without(rank, duo), leaving])
            granted = await duo.gateway.hear(Granted)
            await duo.encoder.deliver(WITH_PICTURE, granted)
            assert isinstance(await duo.gateway.outcome(), Finished)
            await duo.idle()

    run(test())
