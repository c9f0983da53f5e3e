"""Which ranks a request takes, and what is said when there are none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import pytest

from epdctl.gateway.ranks import Ranks
from epdctl.ids import Incarnation, RankName, Stage
from epdctl.wire.lifecycle import Absent, Endpoints, Peer

SPLIT = ("encoder/0", "encoder-router/0", "prefill/0", "decode/0")


def peer(name: str) -> Peer:
    rank = RankName(name)
    encode = f"ipc://{rank.file_stem}.encode" if rank.stage is Stage.MONO else None
    endpoints = Endpoints(inbox=f"ipc://{rank.file_stem}.inbox", encode=encode)
    return Peer(rank=rank, stage=rank.stage, incarnation=Incarnation(1), endpoints=endpoints)


def with_ranks(names: Collection[str], look: Callable[[Ranks], None], planned: Collection[Stage] = ()) -> None:
    async def scene() -> None:
        ranks = Ranks(lambda *_: None, lambda _: None, planned)
        ranks.peers_changed([peer(name) for name in names])
        look(ranks)
        ranks.close()

    asyncio.run(scene())


def parts(ranks: Ranks, *, media: bool) -> list[str | None]:
    """Of a route: entry, exit, and where media go."""
    route = ranks.route(media=media)
    assert route is not None
    router = None if route.router is None else route.router.endpoints.inbox
    return [route.entry.rank, route.exit.rank, router]


def test_a_mono_rank_is_its_own_router() -> None:
    def look(ranks: Ranks) -> None:
        assert parts(ranks, media=True) == ["mono/0", "mono/0", "ipc://mono-0.encode"]
        assert parts(ranks, media=False) == ["mono/1", "mono/1", None]
        assert parts(ranks, media=True) == ["mono/0", "mono/0", "ipc://mono-0.encode"]

    with_ranks(["mono/0", "mono/1"], look)


def test_the_work_of_a_mono_rank_is_counted_once_for_each_inbox() -> None:
    def look(ranks: Ranks) -> None:
        route = ranks.route(media=True)
        assert route is not None
        assert len(set(route.peers)) == 2
        assert all(ranks.routable(each) for each in route.peers)
        for each in route.peers:
            ranks.take(each)
        assert parts(ranks, media=True)[0] == "mono/1"
        for each in route.peers:
            ranks.leave(each)
        ranks.check()

    with_ranks(["mono/0", "mono/1"], look)


def test_nobody_else_sends_media_through_a_mono_rank() -> None:
    """Its encoder writes to its own memory only."""

    def look(ranks: Ranks) -> None:
        routes = [parts(ranks, media=True) for _ in range(2)]
        assert ["prefill/0", "decode/0", "ipc://encoder-router-0.inbox"] in routes
        assert ["mono/0", "mono/0", "ipc://mono-0.encode"] in routes

    with_ranks([*SPLIT, "mono/0"], look)
    with_ranks(["encoder/0", "prefill/0", "decode/0", "mono/0"], lambda ranks: _all_through(ranks, "mono/0"))


def _all_through(ranks: Ranks, only: str) -> None:
    assert {parts(ranks, media=True)[0] for _ in range(3)} == {only}


@pytest.mark.parametrize(
    ("planned", "there", "media", "missing"),
    [
        ((), (), True, ["prefill rank", "decode rank", "encoder-router", "encoder rank"]),
        ((), ("prefill/0",), False, ["decode rank"]),
        ((Stage.MONO,), (), True, ["mono rank"]),
        ((Stage.MONO,), (), False, ["mono rank"]),
        ((Stage.MONO,), ("mono/0",), True, []),
        ((Stage.ENCODER, Stage.LANGUAGE), (), True, ["language rank", "encoder-router", "encoder rank"]),
        ((Stage.ENCODER, Stage.LANGUAGE), ("language/0", "encoder/0"), True, ["encoder-router"]),
        ((Stage.ENCODER, Stage.LANGUAGE), ("language/0",), False, []),
        ((Stage.ENCODER, Stage.PREFILL, Stage.DECODE), SPLIT[:3], True, ["decode rank"]),
        ((Stage.ENCODER, Stage.PREFILL, Stage.DECODE), SPLIT, True, []),
    ],
)
def test_what_is_missing_is_named_by_the_plan(
    planned: Collection[Stage], there: Collection[str], media: bool, missing: list[str]
) -> None:
    def look(ranks: Ranks) -> None:
        assert ranks.missing(media=media) == [f"no {one} is ready" for one in missing]
        assert (ranks.route(media=media) is None) == bool(missing)

    with_ranks(there, look, planned)


@pytest.mark.parametrize(
    ("planned", "sees"),
    [((), True), ((Stage.LANGUAGE,), False), ((Stage.MONO,), True), ((Stage.ENCODER, Stage.LANGUAGE), True)],
)
def test_a_cluster_without_a_tower_is_known(planned: Collection[Stage], sees: bool) -> None:
    def look(ranks: Ranks) -> None:
        assert ranks.sees is sees

    with_ranks((), look, planned)


@pytest.mark.parametrize(
    ("planned", "gone", "media", "ends"),
    [
        ((Stage.PREFILL, Stage.DECODE), ("decode/0",), False, 1),
        ((Stage.PREFILL, Stage.DECODE), ("decode/0", "prefill/0"), False, 2),
        ((Stage.PREFILL, Stage.DECODE, Stage.ENCODER), ("encoder/0",), False, 0),
        ((Stage.PREFILL, Stage.DECODE, Stage.ENCODER), ("encoder/0",), True, 1),
        ((Stage.LANGUAGE, Stage.ENCODER), ("prefill/0", "encoder-router/0"), False, 0),
        ((Stage.LANGUAGE, Stage.ENCODER), ("language/0",), False, 1),
        ((Stage.MONO,), ("encoder/0",), True, 0),
        ((Stage.MONO,), ("mono/0",), True, 1),
        ((Stage.MONO, Stage.LANGUAGE), ("mono/0",), True, 0),
    ],
)
def test_only_stages_that_a_request_needs_are_its_dead_ends(
    planned: Collection[Stage], gone: Collection[str], media: bool, ends: int
) -> None:
    def look(ranks: Ranks) -> None:
        names = [RankName(name) for name in gone]
        ranks.absent_changed(
            [Absent(rank=name, stage=name.stage, incarnation=Incarnation(1), hopeless="failed: x") for name in names]
        )
        assert len(ranks.hopeless(media=media)) == ends

    with_ranks((), look, planned)
