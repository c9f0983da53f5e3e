"""A language rank: the whole answer from one engine and one pool, and the same rules as its siblings."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from epdctl.errors import QuarantineFull, RequestError
from epdctl.rank.service import Recorded
from epdctl.transfer.pool import GRACE_SECONDS
from epdctl.wire.config import Limits
from epdctl.wire.encode import FailureKind
from epdctl.wire.serve import Failed, Finished, FinishReason, Granted, Token
from epdctl.wire.trace import Hop, Kind
from tests.support.language_ranks import Question, Setup, Single, alone, item, run, single, until

PICTURES = Question(tokens=tuple(range(100, 137)), items=(item(0, 3, 4), item(1, 9, 3)))


async def answered(rank: Single, question: Question) -> list[int]:
    rank.ask(question)
    granted = await rank.gateway.hear(Granted, question.name, question.attempt)
    await rank.encoder.deliver(question, granted)
    end = await rank.gateway.outcome(question.name, question.attempt)
    assert isinstance(end, Finished), end
    return rank.gateway.tokens(question.name, question.attempt)


@pytest.mark.parametrize("backend", ["zmq", "memory", "shm"])
@pytest.mark.parametrize("question", [Question(), Question(tokens=(5,), max_tokens=1), PICTURES])
def test_answers_as_the_engine_does(backend: str, question: Question) -> None:
    async def scene() -> None:
        async with single(Setup(backend=backend)) as rank:
            assert await answered(rank, question) == alone(question)
            await rank.rank.idle()

    run(scene())


def test_an_end_token_is_counted_and_not_sent() -> None:
    free = alone(Question())

    async def scene() -> None:
        async with single() as rank:
            assert await answered(rank, Question(stop=(free[2],))) == free[:2]
            end = await rank.gateway.outcome()
            assert isinstance(end, Finished)
            assert (end.reason, end.usage.completion_tokens, end.usage.prompt_tokens) == (FinishReason.STOP, 3, 11)

    run(scene())


def test_slots_are_free_while_the_answer_is_written() -> None:
    """An embedding pool for one request serves the next as soon as the prompt of the first is computed."""
    question = replace(PICTURES, max_tokens=9)

    async def scene() -> None:
        async with single(Setup(embedding_bytes=512)) as rank:
            rank.rank.engine.hold()
            rank.ask(question)
            await rank.encoder.deliver(question, await rank.gateway.hear(Granted))
            rank.ask(replace(question, name="second"))
            await until(lambda: rank.rank.service.pulse().inflight == 2)
            assert not rank.gateway.about("second")
            for _ in range(7):  # 37 tokens, 6 a step
                rank.rank.engine.step_once()
            await rank.gateway.hear(Token)
            await rank.gateway.hear(Granted, "second")
            assert not any(isinstance(message, Finished) for message in rank.gateway.heard)

    run(scene())


@pytest.mark.parametrize("landed", [0, 1, 2])
def test_an_abort_frees_pages_and_slots(landed: int) -> None:
    async def scene() -> None:
        async with single() as rank:
            rank.rank.engine.hold()
            rank.ask(PICTURES)
            granted = await rank.gateway.hear(Granted)
            await rank.encoder.deliver(PICTURES, granted, which=range(landed))
            if landed == 2:
                await until(rank.rank.engine.inside.is_set)
            rank.abort(PICTURES)
            if landed == 2:
                await until(lambda: not any(not stay.over for stay in rank.rank.service._stays.values()))
                assert rank.rank.free_pages < 64  # the step in flight still writes there
            rank.rank.engine.let_go()
            await rank.rank.idle()
            assert await answered(rank, replace(PICTURES, attempt=2)) == alone(PICTURES)

    run(scene())


def test_aborting_what_is_not_there_is_fine() -> None:
    async def scene() -> None:
        async with single() as rank:
            rank.abort(PICTURES)
            assert await answered(rank, Question()) == alone(Question())

    run(scene())


def test_a_request_that_comes_twice_is_worked_on_once() -> None:
    async def scene() -> None:
        async with single() as rank:
            rank.ask(PICTURES)
            rank.ask(PICTURES)
            assert await answered(rank, replace(Question(), name="other")) == alone(Question())
            assert len(rank.gateway.about("r1")) == 1

    run(scene())


@pytest.mark.parametrize(
    "question",
    [Question(tokens=()), Question(max_tokens=0), Question(items=(item(0, 1, 2), item(0, 4, 2)))],
    ids=["no-tokens", "no-answer", "same-index"],
)
def test_what_the_engine_could_not_take_is_refused_at_the_door(question: Question) -> None:
    async def scene() -> None:
        async with single() as rank:
            rank.ask(question)
            end = await rank.gateway.outcome()
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.INTERNAL
            await rank.rank.idle()

    run(scene())


def test_a_sequence_that_the_engine_refuses_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with single() as rank:
            good = rank.rank.engine.admit

            def admit(new: object) -> None:
                monkeypatch.setattr(rank.rank.engine, "admit", good)
                raise RequestError(400, "a token outside the vocabulary")

            monkeypatch.setattr(rank.rank.engine, "admit", admit)
            rank.ask(Question(name="bad"))
            end = await rank.gateway.outcome("bad")
            assert isinstance(end, Failed)
            assert end.text == "a token outside the vocabulary"
            assert await answered(rank, Question()) == alone(Question())
            await rank.rank.idle()

    run(scene())


def test_the_pulse_advances_with_every_step_and_counts_pages() -> None:
    async def scene() -> None:
        async with single(Setup(limits=Limits(inflight=1))) as rank:
            rank.rank.engine.hold()
            rank.ask(Question())
            rank.ask(Question(name="waits"))
            await until(rank.rank.engine.inside.is_set)
            await until(lambda: rank.rank.service.pulse().inflight == 2)
            before = rank.rank.service.pulse()
            assert (before.completed, before.free_pages, before.total_pages) == (0, 60, 64)
            rank.rank.engine.step_once()
            await until(lambda: rank.rank.service.pulse().completed == 1)
            rank.rank.engine.let_go()
            await rank.gateway.outcome("waits")
            assert rank.rank.service.pulse().completed == 12  # two prompts of two steps, four more tokens each

    run(scene())


def test_a_capture_begins_and_ends_between_steps_of_a_busy_engine(tmp_path: Path) -> None:
    written: list[Recorded] = []
    trace = tmp_path / "trace.json"

    async def scene() -> None:
        async with single() as rank:
            rank.rank.engine.hold()
            rank.ask(Question(max_tokens=40))
            await until(rank.rank.engine.inside.is_set)
            rank.rank.service.start_capture(str(trace), 3, written.append)
            rank.rank.engine.let_go()
            await until(lambda: bool(written))
            await rank.gateway.outcome()

    run(scene())
    assert written == [Recorded()]
    assert json.loads(trace.read_text())["traceEvents"] is not None


def test_the_hops_of_an_answer_are_noted_and_its_steps_within_them() -> None:
    async def scene() -> None:
        async with single() as rank:
            service = rank.rank.service
            service.hops.start()
            assert await answered(rank, PICTURES) == alone(PICTURES)
            await rank.rank.idle()
            hops = service.hops.stop().hops
            states = [hop for hop in hops if not hop.inner]
            assert [hop.name for hop in states][:3] == ["waiting", "landing", "running"]
            assert all(one.ended == next_.began for one, next_ in pairwise(states))
            inner = {state.name: [hop for hop in hops if hop.inner and within(hop, state)] for state in states}
            assert sorted(hop.name for hop in inner["landing"]) == ["item 0", "item 1"]
            work = [hop.name for hop in inner["running"]]
            assert work == sorted(work), "chunks come before steps"
            assert work.count("step") == PICTURES.max_tokens - 1, "the last chunk gives the first token"
            assert "chunk" in work
            assert {(hop.kind, hop.request, hop.attempt) for hop in hops} == {(Kind.GENERATE, PICTURES.name, 1)}

    run(scene())


def within(hop: Hop, state: Hop) -> bool:
    return state.began <= hop.began and (hop.ended or 0) <= (state.ended or 0)


def test_drained_when_the_last_answer_is_out() -> None:
    async def scene() -> None:
        async with single() as rank:
            assert await answered(rank, Question()) == alone(Question())
            await rank.rank.service.drain()
            rank.ask(Question(name="late"))
            end = await rank.gateway.outcome("late")
            assert isinstance(end, Failed)
            assert (end.kind, end.text) == (FailureKind.RANK_LOST, "language/0 is draining")

    run(scene())


def test_a_rank_of_which_lost_writers_hold_too_much_says_so_instead_of_beating() -> None:
    async def scene() -> None:
        async with single(Setup(embedding_bytes=4096)) as rank:
            service = rank.rank.service
            (pool,) = service._written
            lease = pool.lease(2048, "lost", seconds=60)
            pool.enter(lease.id, lease.generation, "encoder/0.1")
            assert service.pulse().leases == 1
            pool.release(lease.id)
            assert service.pulse().leases == 1
            pool._since[lease.id] -= GRACE_SECONDS
            with pytest.raises(QuarantineFull, match=r"2048 of 4096 bytes of the embeddings pool.*encoder/0\.1"):
                service.pulse()
            pool.leave(lease.id, "encoder/0.1")
            assert service.pulse().leases == 0

    run(scene())


def test_an_idle_rank_finds_that_a_page_is_lost_and_says_so() -> None:
    async def scene() -> None:
        async with single() as rank:
            await answered(rank, PICTURES)
            await rank.rank.idle()
            pages = rank.rank.service.machine.pages
            lost = pages.take(1)
            assert rank.rank.service.pulse().unhealthy is None, "nothing has happened since"
            await answered(rank, replace(PICTURES, attempt=2))
            await until(lambda: rank.rank.service.pulse().inflight == 0)
            assert rank.rank.service.pulse().unhealthy == "with nothing in flight, a KV page belongs to nobody"
            pages.give(lost)
            await answered(rank, replace(PICTURES, attempt=3))
            await rank.rank.idle()

    run(scene())
