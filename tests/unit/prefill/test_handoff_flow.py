"""One request through a prefill and a decode rank: the protocol in order, and the tokens of a single engine."""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial

import pytest

from epdctl.errors import PeerGone
from epdctl.transfer.shm import ShmMover
from epdctl.wire.config import Limits
from epdctl.wire.encode import FailureKind
from epdctl.wire.serve import Failed, Finished, FinishReason, Granted, KvLayout, Token, Usage
from tests.support.language_ranks import LAYOUT, PAGE, FakeEngine, Question, Setup, alone, item, pair, run, until
from tests.support.ranks import make_peer

PICTURES = (item(0, 3, 4), item(1, 9, 3))
LONG = tuple(range(100, 137))  # several chunks and pages, the last of each partial


@pytest.mark.parametrize("backend", ["zmq", "memory", "shm"])
@pytest.mark.parametrize(
    "question",
    [
        Question(),
        Question(tokens=(5,)),
        Question(tokens=tuple(range(16))),  # pages exactly full
        Question(tokens=LONG, max_tokens=9),
        Question(tokens=LONG, items=PICTURES),
    ],
    ids=["short", "one-token", "full-pages", "long", "pictures"],
)
def test_answers_as_one_engine_would(backend: str, question: Question) -> None:
    async def scene() -> None:
        async with pair(Setup(backend=backend)) as ranks:
            assert await ranks.answer(question) == alone(question)
            assert isinstance(ranks.gateway.heard[0], Granted)
            assert ranks.gateway.heard[-1] == Finished(
                request=question.request,
                attempt=1,
                reason=FinishReason.LENGTH,
                usage=Usage(prompt_tokens=len(question.tokens), completion_tokens=question.max_tokens),
            )
            await ranks.idle()

    run(scene())


def test_many_at_once_each_get_their_own_answer() -> None:
    questions = [
        Question(tokens=tuple(range(n, 2 * n + 3)), items=(item(0, 1, 2),) if n % 2 else (), name=f"r{n}", room=n)
        for n in range(1, 13)
    ]

    async def scene() -> None:
        async with pair(Setup(pages=40)) as ranks:  # not enough for all at once: some wait in line
            for question in questions:
                ranks.ask(question)
            for question in questions:
                await ranks.encoder.deliver(question, await ranks.gateway.hear(Granted, question.name))
            for question in questions:
                assert isinstance(await ranks.gateway.outcome(question.name), Finished)
                assert ranks.gateway.tokens(question.name) == alone(question)
            await ranks.idle()

    run(scene())


@pytest.mark.parametrize("lease_first", [True, False])
def test_either_half_of_a_room_may_come_first(lease_first: bool) -> None:
    question = Question()

    async def scene() -> None:
        async with pair() as ranks:
            service = ranks.prefill.service
            if lease_first:
                ranks.send_decode(question)
                await until(lambda: bool(service._early))  # type: ignore[attr-defined]
                ranks.send_prefill(question)
            else:
                ranks.send_prefill(question)
                await until(lambda: service.pulse().inflight == 1)
                assert ranks.prefill.free_pages == service.pulse().total_pages  # it waits, and holds nothing
                ranks.send_decode(question)
            await ranks.gateway.outcome()
            assert ranks.gateway.tokens() == alone(question)
            await ranks.idle()

    run(scene())


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_end_token_ends_the_answer_and_is_counted_but_not_sent(place: int) -> None:
    free = alone(Question())
    question = Question(stop=(free[place],))

    async def scene() -> None:
        async with pair() as ranks:
            assert await ranks.answer(question) == free[:place]
            end = await ranks.gateway.outcome()
            assert isinstance(end, Finished)
            assert (end.reason, end.usage.completion_tokens) == (FinishReason.STOP, place + 1)
            await ranks.idle()

    run(scene())


def test_an_answer_of_one_token_never_enters_decodes_engine() -> None:
    question = Question(max_tokens=1)

    async def scene() -> None:
        async with pair() as ranks:
            assert await ranks.answer(question) == alone(question)
            await ranks.idle()
            assert ranks.decode.engine.steps == 0

    run(scene())


def test_pages_go_out_while_the_next_chunk_runs() -> None:
    question = Question(tokens=LONG)

    async def scene() -> None:
        async with pair() as ranks:
            ranks.prefill.engine.hold()
            ranks.ask(question)
            await ranks.gateway.hear(Granted)
            ranks.prefill.engine.step_once()
            await until(lambda: ranks.prefill.engine.steps == 1)  # 6 tokens: one page of 4 is whole
            pages = ranks.decode.engine.kv.view
            await until(lambda: bool((pages[:, 0, 0, :, 0, 0] == 100.0).any()))
            assert not (pages == 104.0).any()  # the second page is half computed, and stays
            ranks.prefill.engine.let_go()
            await ranks.gateway.outcome()
            assert ranks.gateway.tokens() == alone(question)

    run(scene())


def stepped(engine: FakeEngine, steps: int) -> bool:
    return engine.steps == steps


def test_the_last_pages_wait_for_their_own_chunk_and_not_for_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what the next step was given stands in the same stream: what is waited for is noted before it."""
    first, other = Question(tokens=LONG), Question(tokens=(*LONG, *LONG), name="other", room=8)
    waited: list[object] = []
    monkeypatch.setattr(ShmMover, "wait", lambda _, made: waited.append(made))

    async def scene() -> None:
        async with pair(Setup(backend="shm")) as ranks:
            engine = ranks.prefill.engine
            monkeypatch.setattr(ShmMover, "made", lambda _: (threading.current_thread().name, engine.steps))
            engine.hold()
            for question in (first, other):
                ranks.ask(question)
                await ranks.gateway.hear(Granted, question.name)
            chunks = -(-len(LONG) // engine.chunk)
            for step in range(1, chunks + 1):
                engine.step_once()
                await until(partial(stepped, engine, step))
            await ranks.gateway.hear(Token)
            assert engine.steps == chunks  # the next one is under way
            assert waited[-1] == ("compute", chunks)
            engine.let_go()
            for question in (first, other):
                await ranks.gateway.outcome(question.name)
                assert ranks.gateway.tokens(question.name) == alone(question)

    run(scene())


def test_layouts_that_differ_are_refused_with_both_values() -> None:
    other = KvLayout(page_size=PAGE, layers=3, kv_heads=1, head_dim=2, dtype="float32")

    async def scene() -> None:
        async with pair(decode=Setup(layout=other)) as ranks:
            ranks.ask(Question())
            end = await ranks.gateway.outcome()
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.INTERNAL
            assert f"layers {LAYOUT.layers} here, {other.layers} there" in end.text
            await until(lambda: sum(isinstance(message, Failed) for message in ranks.gateway.heard) == 2)
            await ranks.idle()

    run(scene())


def test_a_prompt_beyond_the_pool_is_refused_with_numbers_on_both_ranks() -> None:
    question = Question(tokens=tuple(range(60)))

    async def scene() -> None:
        async with pair(Setup(pages=10), Setup(pages=64)) as ranks:
            ranks.ask(question)
            failures = ranks.gateway
            end = await failures.outcome()
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.TOO_LARGE
            assert "15 KV pages; this rank has 10" in end.text
            await ranks.idle()

    run(scene())


def test_embeddings_beyond_the_pool_are_refused_with_numbers() -> None:
    question = Question(items=(item(0, 1, 5), item(1, 6, 5)))

    async def scene() -> None:
        async with pair(Setup(embedding_bytes=256)) as ranks:
            ranks.ask(question)
            end = await ranks.gateway.outcome()
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.TOO_LARGE
            assert "need 512 bytes; the pool of this rank has 256" in end.text
            await ranks.idle()

    run(scene())


def test_a_full_line_is_told() -> None:
    limits = Limits(inflight=1, queue=1)

    async def scene() -> None:
        async with pair(decode=Setup(limits=limits)) as ranks:
            for number in (1, 2, 3):
                ranks.send_decode(Question(name=f"r{number}", room=number))
            end = await ranks.gateway.outcome("r3")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.FULL
            assert ranks.decode.service.pulse().inflight == 2  # one holds pages, one waits

    run(scene())


def test_a_waiting_request_starts_when_the_one_before_it_ends() -> None:
    first, second = Question(name="a", room=1), Question(name="b", room=2, tokens=LONG)

    async def scene() -> None:
        async with pair(Setup(limits=Limits(inflight=1)), Setup(limits=Limits(inflight=1))) as ranks:
            ranks.ask(first)
            ranks.ask(second)
            await ranks.gateway.outcome("b")
            assert ranks.gateway.tokens("a") == alone(first)
            assert ranks.gateway.tokens("b") == alone(second)
            names = [message.request for message in ranks.gateway.heard if isinstance(message, Token)]
            assert names == ["a"] * 5 + ["b"] * 5
            await ranks.idle()

    run(scene())


def test_a_late_embedding_of_an_earlier_attempt_is_dropped() -> None:
    question = Question(tokens=LONG, items=PICTURES)
    again = Question(tokens=LONG, items=PICTURES, attempt=2)

    async def scene() -> None:
        async with pair() as ranks:
            ranks.ask(question)
            old = await ranks.gateway.hear(Granted)
            ranks.abort(question)
            await ranks.idle()
            ranks.ask(again)
            granted = await ranks.gateway.hear(Granted, attempt=2)
            assert granted.slots[0].extents == old.slots[0].extents  # the very same bytes, under a new generation
            ranks.encoder.announce(question, old, 0)
            ranks.encoder.announce(again, old, 0)  # this attempt, with the earlier attempt's slot
            await ranks.encoder.deliver(again, granted)
            await ranks.gateway.outcome(attempt=2)
            assert ranks.gateway.tokens(attempt=2) == alone(again)
            await ranks.idle()

    run(scene())


def test_an_embedding_of_another_shape_fails_the_request_and_nothing_else() -> None:
    question = Question(items=(item(0, 2, 4),))
    smaller = Question(items=(item(0, 2, 3),))

    async def scene() -> None:
        async with pair() as ranks:
            ranks.ask(question)
            granted = await ranks.gateway.hear(Granted)
            ranks.encoder.announce(smaller, granted, 0)
            end = await ranks.gateway.outcome()
            assert isinstance(end, Failed)
            assert "the encoder wrote [3, 4] of float32, the prompt takes [4, 4]" in end.text
            await ranks.idle()

    run(scene())


def test_a_drained_rank_finishes_what_it_has_and_takes_nothing_new() -> None:
    first, second = Question(name="a", room=1), Question(name="b", room=2)

    async def scene() -> None:
        async with pair() as ranks:
            ranks.prefill.engine.hold()
            ranks.ask(first)
            await ranks.gateway.hear(Granted, "a")
            draining = asyncio.ensure_future(ranks.prefill.service.drain())
            await until(lambda: ranks.prefill.service._draining)
            ranks.ask(second)
            end = await ranks.gateway.outcome("b")
            assert isinstance(end, Failed)
            assert end.kind is FailureKind.RANK_LOST
            assert "draining" in end.text
            assert not draining.done()
            ranks.prefill.engine.let_go()
            await draining
            await ranks.gateway.outcome("a")
            assert ranks.gateway.tokens("a") == alone(first)
            await ranks.idle()

    run(scene())


@pytest.mark.parametrize(("known", "level"), [(True, logging.WARNING), (False, logging.INFO)], ids=["lost", "stopped"])
def test_a_gateway_that_is_gone_frees_its_work(known: bool, level: int, caplog: pytest.LogCaptureFixture) -> None:
    """One that is stopped has left the table before: that it goes is no news."""
    caplog.set_level(logging.INFO)
    question = Question(items=(item(0, 2, 4),))

    async def scene() -> None:
        async with pair() as ranks:
            gateway = [make_peer("gateway/0")] if known else []
            for rank in (ranks.prefill, ranks.decode):
                rank.service.peers_changed([ranks.prefill.peer, ranks.decode.peer, *gateway])
            ranks.ask(question)
            granted = await ranks.gateway.hear(Granted)
            ranks.to_prefill.close()
            ranks.to_decode.close()
            await ranks.encoder.deliver(question, granted)
            await ranks.idle()
            with pytest.raises(PeerGone):
                ranks.to_decode.send(None)

    run(scene())
    assert {record.levelno for record in caplog.records if "a gateway is gone" in record.message} == {level}
