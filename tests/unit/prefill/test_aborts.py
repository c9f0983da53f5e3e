"""Given up at every point of its life, by the gateway, by time or by a peer: all is freed, and never too early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from epdctl.ids import Incarnation
from epdctl.transfer import landing
from epdctl.transfer.landing import Frame
from epdctl.wire.config import Limits
from epdctl.wire.encode import FailureKind
from epdctl.wire.serve import Abort, Failed, Finished, Granted, Token
from epdctl.wire.transfer import Write
from tests.support.halfway import Halfway
from tests.support.language_ranks import Pair, Question, Rank, Setup, alone, item, pair, run, until

QUESTION = Question(tokens=tuple(range(100, 137)), items=(item(0, 3, 4), item(1, 9, 3)), name="mine", room=1)
NEXT = Question(tokens=tuple(range(50, 80)), items=(item(0, 2, 2),), name="next", room=2)


@dataclass
class Held:
    """Something that a test keeps from going on, and what may not be free until it does."""

    let_go: Callable[[], None] = lambda: None
    busy: Callable[[], bool] | None = None


@dataclass
class Gate:
    """Holds every write on its way until it is opened."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)
    passing: int = 0

    async def __call__(self, _: str, write: Write, frames: Sequence[Frame]) -> Sequence[Frame]:
        if write.pool == "kv":
            self.passing += 1
            await self.opened.wait()
        return frames


async def prompt_alone(ranks: Pair) -> Held:
    ranks.send_prefill(QUESTION)
    await until(lambda: ranks.prefill.service.pulse().inflight == 1)
    return Held()


async def lease_alone(ranks: Pair) -> Held:
    ranks.send_decode(QUESTION)
    await until(lambda: bool(ranks.prefill.service._early))  # type: ignore[attr-defined]
    return Held()


async def granted(ranks: Pair) -> Held:
    ranks.ask(QUESTION)
    await ranks.gateway.hear(Granted, "mine")
    return Held()


async def one_embedding(ranks: Pair) -> Held:
    await granted(ranks)
    await ranks.encoder.deliver(QUESTION, await ranks.gateway.hear(Granted, "mine"), which=[1])
    service = ranks.prefill.service
    await until(lambda: any(len(stay.missing) == 1 for stay in service._stays.values()))
    return Held()


async def prompt_step(ranks: Pair) -> Held:
    ranks.prefill.engine.hold()
    await granted(ranks)
    await ranks.encoder.deliver(QUESTION, await ranks.gateway.hear(Granted, "mine"))
    await until(ranks.prefill.engine.inside.is_set)
    return Held(ranks.prefill.engine.let_go, lambda: taken(ranks.prefill) == 10)


async def write_under_way(ranks: Pair) -> Held:
    """Prefill writes pages: within one process not a byte of them has landed, else half of the first ones."""
    if ranks.halfway is not None:
        return await half_a_write(ranks, ranks.halfway)
    gate = Gate()
    ranks.world.exchange.passing = gate
    await granted(ranks)
    await ranks.encoder.deliver(QUESTION, await ranks.gateway.hear(Granted, "mine"))
    await until(lambda: gate.passing == 1)
    return Held(gate.opened.set, lambda: taken(ranks.prefill) == 10)


async def half_a_write(ranks: Pair, halfway: Halfway) -> Held:
    held = await prompt_step(ranks)
    halfway.arm()
    held.let_go()
    await until(halfway.reached.is_set)
    return Held(halfway.let_go, lambda: (taken(ranks.prefill), taken(ranks.decode)) == (10, 11))


async def answer_step(ranks: Pair) -> Held:
    ranks.decode.engine.hold()
    await granted(ranks)
    await ranks.encoder.deliver(QUESTION, await ranks.gateway.hear(Granted, "mine"))
    await ranks.gateway.hear(Token, "mine")
    await until(ranks.decode.engine.inside.is_set)
    return Held(ranks.decode.engine.let_go, lambda: taken(ranks.decode) == 11)


async def finished(ranks: Pair) -> Held:
    assert await ranks.answer(QUESTION) == alone(QUESTION)
    return Held()


def going_on(rank: Rank) -> bool:
    return any(not stay.over for stay in rank.service._stays.values())


def taken(rank: Rank) -> int:
    pulse = rank.service.pulse()
    return pulse.total_pages - pulse.free_pages


Point = Callable[[Pair], Awaitable[Held]]
POINTS: list[Point] = [
    prompt_alone,
    lease_alone,
    granted,
    one_embedding,
    prompt_step,
    write_under_way,
    answer_step,
    finished,
]
OVER: list[tuple[str, list[Point]]] = [("memory", POINTS), ("shm", POINTS), ("mooncake", [write_under_way])]
BEFORE_KV: list[Point] = [lease_alone, granted, one_embedding, prompt_step, write_under_way]


def at(points: Sequence[Point]) -> pytest.MarkDecorator:
    """Each of these points over each way to move bytes that makes a difference there."""
    cases = [(backend, point) for backend, theirs in OVER for point in points if point in theirs]
    return pytest.mark.parametrize(("backend", "point"), cases, indirect=["backend"])


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    return str(request.param)


@pytest.fixture
def ranks_over(backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractAsyncContextManager[Pair]]:
    halfway = None if backend == "memory" else Halfway(backend, monkeypatch.setattr)

    @asynccontextmanager
    async def over() -> AsyncIterator[Pair]:
        async with pair(Setup(backend=backend)) as ranks:
            ranks.halfway = halfway
            yield ranks

    return over


Over = Callable[[], AbstractAsyncContextManager[Pair]]


async def freed_and_useful(ranks: Pair, held: Held) -> None:
    """What is still in use is not free; then all is, and the next request gets a right answer from it."""
    if held.busy is not None:
        assert held.busy()
    held.let_go()
    await ranks.idle()
    assert await ranks.answer(NEXT) == alone(NEXT)
    await ranks.idle()


@at(POINTS)
def test_an_abort_frees_everything_and_nothing_too_early(ranks_over: Over, point: Point) -> None:
    async def scene() -> None:
        async with ranks_over() as ranks:
            held = await point(ranks)
            ranks.abort(QUESTION)
            await until(lambda: not going_on(ranks.prefill) and not going_on(ranks.decode))
            await freed_and_useful(ranks, held)
            assert point is finished or not any(isinstance(m, Finished) for m in ranks.gateway.about("mine"))

    run(scene())


@at([*BEFORE_KV, prompt_alone, answer_step])
def test_time_that_ends_is_told_and_frees_everything(ranks_over: Over, point: Point) -> None:
    async def scene() -> None:
        async with ranks_over() as ranks:
            held = await point(ranks)
            for rank in (ranks.prefill, ranks.decode):
                for stay in list(rank.service._stays.values()):
                    rank.service._late(stay)
            end = await ranks.gateway.outcome("mine")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.DEADLINE
            assert "its time ended on" in end.text
            await freed_and_useful(ranks, held)

    run(scene())


def test_the_budget_of_a_request_arms_its_deadline() -> None:
    question = replace(QUESTION, budget_s=0.01)

    async def scene() -> None:
        async with pair() as ranks:
            ranks.send_prefill(question)
            end = await ranks.gateway.outcome("mine")
            assert isinstance(end, Failed)
            assert end.text == "its time ended on prefill/0 while waiting for pages of decode/0"
            await ranks.idle()

    run(scene())


def test_a_lease_whose_prompt_never_comes_is_given_back() -> None:
    async def scene() -> None:
        async with pair(Setup(limits=Limits(request_seconds=0.01))) as ranks:
            ranks.send_decode(QUESTION)
            end = await ranks.gateway.outcome("mine")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.DEADLINE
            assert "no prompt came to prefill/0" in end.text
            await ranks.idle()

    run(scene())


@at(BEFORE_KV)
def test_a_prefill_rank_lost_before_the_pages_are_full_fails_the_request_as_retryable(
    ranks_over: Over, point: Point
) -> None:
    async def scene() -> None:
        async with ranks_over() as ranks:
            held = await point(ranks)
            ranks.decode.service.peers_changed([ranks.decode.peer])
            end = await ranks.gateway.outcome("mine")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            assert "prefill/0 went away" in end.text
            await until(lambda: not going_on(ranks.decode))
            held.let_go()
            await ranks.decode.idle()

    run(scene())


def test_a_prefill_rank_lost_after_the_pages_are_full_does_not_matter() -> None:
    async def scene() -> None:
        async with pair(Setup(backend="memory")) as ranks:
            held = await answer_step(ranks)
            ranks.decode.service.peers_changed([ranks.decode.peer])
            held.let_go()
            assert isinstance(await ranks.gateway.outcome("mine"), Finished)
            assert ranks.gateway.tokens("mine") == alone(QUESTION)

    run(scene())


@at([prompt_alone, granted, one_embedding, prompt_step, write_under_way])
def test_a_decode_rank_lost_frees_its_rooms_on_prefill(ranks_over: Over, point: Point) -> None:
    async def scene() -> None:
        async with ranks_over() as ranks:
            held = await point(ranks)
            ranks.prefill.service.peers_changed([ranks.prefill.peer])
            end = await ranks.gateway.outcome("mine")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            held.let_go()
            await ranks.prefill.idle()

    run(scene())


def test_a_lost_decode_rank_takes_its_early_leases_with_it() -> None:
    async def scene() -> None:
        async with pair() as ranks:
            await lease_alone(ranks)
            ranks.prefill.service.peers_changed([ranks.prefill.peer])
            assert not ranks.prefill.service._early  # type: ignore[attr-defined]

    run(scene())


def test_a_room_that_names_an_earlier_incarnation_is_refused_at_once() -> None:
    async def scene() -> None:
        async with pair() as ranks:
            successor = msgspec.structs.replace(ranks.prefill.peer, incarnation=Incarnation(2))
            ranks.decode.service.peers_changed([ranks.decode.peer, successor])
            ranks.send_decode(QUESTION)
            end = await ranks.gateway.outcome("mine")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            assert "prefill/0 (incarnation 1) is not among the routable ranks" in end.text
            await ranks.decode.idle()

    run(scene())


def test_a_room_whose_prefill_rank_becomes_known_a_moment_later_is_served() -> None:
    async def scene() -> None:
        async with pair() as ranks:
            both = [ranks.decode.peer, ranks.prefill.peer]
            ranks.decode.service.peers_changed([ranks.decode.peer])
            ranks.ask(NEXT)
            await until(lambda: ranks.decode.service.pulse().inflight == 1)
            ranks.decode.service.peers_changed(both)
            await ranks.encoder.deliver(NEXT, await ranks.gateway.hear(Granted, "next"))
            await ranks.gateway.outcome("next")
            assert ranks.gateway.tokens("next") == alone(NEXT)

    run(scene())


def test_pages_refused_by_decode_fail_the_request_as_retryable() -> None:
    """Decode's own lease ended under prefill's write: its generation is stale."""

    async def scene() -> None:
        async with pair(Setup(backend="memory")) as ranks:
            held = await write_under_way(ranks)
            pool = ranks.decode.service._kv  # type: ignore[attr-defined]
            (lease,) = pool.leases.live()
            pool.filled(lease.id, lease.generation)
            pool.release(lease.id)
            for stay in ranks.decode.service._stays.values():
                stay.grant = None
            held.let_go()
            end = await ranks.gateway.outcome("mine")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            await ranks.prefill.idle()

    run(scene())


@pytest.mark.parametrize("backend", ["zmq", "shm"])
def test_pages_that_changed_on_their_way_fail_their_request_and_no_other(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums_of, question = landing.sums_of, Question()

    async def scene() -> None:
        async with pair(Setup(backend=backend, checksum=True)) as ranks:
            monkeypatch.setattr(landing, "sums_of", lambda pieces: [one ^ 1 for one in sums_of(pieces)])
            ranks.ask(question)
            end = await ranks.gateway.outcome(question.name)
            assert isinstance(end, Failed)
            assert (end.kind, "have the checksum" in end.text) == (FailureKind.INTERNAL, True)
            await ranks.idle()
            monkeypatch.setattr(landing, "sums_of", sums_of)
            assert await ranks.answer(NEXT) == alone(NEXT)
            await ranks.idle()

    run(scene())


def test_an_error_of_the_engine_ends_the_rank_and_not_in_silence() -> None:
    async def scene() -> None:
        async with pair() as ranks:
            ranks.prefill.engine.fail_with = RuntimeError("the device is gone")
            ranks.ask(replace(QUESTION, items=()))
            await ranks.gateway.outcome("mine")

    with pytest.raises(RuntimeError, match="the device is gone"):
        run(scene())


@at([lease_alone, granted, one_embedding, prompt_step, write_under_way])
def test_a_room_that_decode_gives_up_is_freed_on_prefill(ranks_over: Over, point: Point) -> None:
    async def scene() -> None:
        async with ranks_over() as ranks:
            held = await point(ranks)
            ranks.to_decode.send(Abort(request=QUESTION.request, attempt=QUESTION.attempt))
            await until(lambda: not going_on(ranks.prefill) and not ranks.prefill.service._early)  # type: ignore[attr-defined]
            held.let_go()
            await ranks.idle()
            assert not any(isinstance(message, Failed) for message in ranks.gateway.heard)

    run(scene())


def test_a_draining_prefill_rank_sends_leases_without_a_prompt_back() -> None:
    async def scene() -> None:
        async with pair() as ranks:
            await lease_alone(ranks)
            await ranks.prefill.service.drain()
            early = await ranks.gateway.outcome("mine")
            assert isinstance(early, Failed)
            assert early.text == "prefill/0 is draining"
            ranks.send_decode(NEXT)
            late = await ranks.gateway.outcome("next")
            assert isinstance(late, Failed)
            assert late.kind is FailureKind.RANK_LOST
            await ranks.idle()

    run(scene())
