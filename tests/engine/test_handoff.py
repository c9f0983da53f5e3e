"""Prefill and decode ranks around real engines, pages over the transport: token for token what ``generate`` answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from epdctl.decode.language import LanguageService
from epdctl.decode.service import DecodeService
from epdctl.engine.api import LanguageModel, Tower
from epdctl.engine.core import Engine
from epdctl.engine.kv import KvPool
from epdctl.errors import LoadError
from epdctl.ids import Stage
from epdctl.prefill import service
from epdctl.prefill.handoff import stretches
from epdctl.prefill.service import PrefillService
from epdctl.rank.language import LanguageRank
from epdctl.rank.machine import Loaded
from epdctl.wire.config import EngineConfig, RankSpec
from epdctl.wire.serve import Finished, FinishReason, Granted
from tests.engine.harness import Case, pictures
from tests.engine.harness import Question as Asked
from tests.engine.harness import question as prepared
from tests.support.checkpoints import every_family, model_config
from tests.support.language_ranks import Pair, Question, Setup, pair, run, single, until, world


def no_picture(seed: int) -> Case:
    return Case((f"Which of the shapes is the largest, and why do you think so? Number {seed}.",), 16)


def two_between_text(seed: int) -> Case:
    first, second = pictures(seed, [(140, 100), (60, 200)])
    return Case(("The first is ", first, " and then comes ", second, ". Which is darker?"), 16)


def numbered(number: int) -> Callable[[int], Case]:
    def build(seed: int) -> Case:
        files = pictures(10 * number + seed + 1, [(84 + 14 * number, 112)][: number % 2])
        return Case((*files, f"Question {number}, " + "and so on " * number), 4 + number)

    return build


def setup(language: LanguageModel, pages: int, chunk_tokens: int = 32) -> Setup:
    kv = KvPool(language.layout(16), pages)
    config = EngineConfig(page_size=16, chunk_tokens=chunk_tokens, kv_tokens=pages * 16)
    loaded = Loaded(Engine(language, kv, config), kv, language.row_width)
    return Setup(pages=pages, embedding_bytes=4 << 20, loaded=loaded)


def wire(asked: Asked, number: int = 1) -> Question:
    return Question(
        tokens=asked.tokens,
        items=asked.items,
        max_tokens=asked.max_new_tokens,
        stop=asked.sampling.stop_token_ids,
        name=f"r{number}",
        room=number,
        embeddings=asked.embeddings,
    )


def sent(asked: Asked) -> list[int]:
    """The reference's answer without its end token."""
    answer = asked.reference.answer
    return answer[:-1] if answer[-1] in asked.sampling.stop_token_ids else answer


@every_family
@pytest.mark.parametrize("build", [no_picture, two_between_text])
@pytest.mark.parametrize("chunk_tokens", [13, 512])
def test_split_into_prefill_and_decode_the_answer_is_that_of_generate(
    build: Callable[[int], Case], chunk_tokens: int, checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    asked = prepared(build, checkpoint, tower)

    async def scene() -> None:
        async with pair(setup(language, 40, chunk_tokens), setup(language, 64)) as ranks:
            ranks.decode.service.machine.pages.take(3)  # so that page numbers differ
            assert await ranks.answer(wire(asked)) == sent(asked)
            end = await ranks.gateway.outcome()
            assert isinstance(end, Finished)
            assert end.usage.completion_tokens == len(asked.reference.answer)

    run(scene())


@every_family
def test_six_at_once_through_the_handoff(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = {number: prepared(numbered(number), checkpoint, tower) for number in range(6)}

    async def ask(ranks: Pair, number: int) -> None:
        assert await ranks.answer(wire(asked[number], number)) == sent(asked[number])

    async def scene() -> None:
        async with pair(setup(language, 24), setup(language, 24)) as ranks:  # not room for all at once
            await asyncio.gather(*(ask(ranks, number) for number in asked))
            await ranks.idle()

    run(scene())


@every_family
def test_a_language_rank_answers_as_generate_does(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = prepared(two_between_text, checkpoint, tower)
    question = wire(asked)

    async def scene() -> None:
        async with single(setup(language, 40)) as rank:
            rank.ask(question)
            await rank.encoder.deliver(question, await rank.gateway.hear(Granted))
            assert isinstance(await rank.gateway.outcome(), Finished)
            assert rank.gateway.tokens() == sent(asked)
            await rank.rank.idle()

    run(scene())


@every_family
def test_a_lost_page_would_show(
    checkpoint: Path, tower: Tower, language: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof that the tests above can fail: without its KV, decode says something else."""
    asked = prepared(two_between_text, checkpoint, tower)
    question = replace(wire(asked), stop=())

    async def scene() -> None:
        async with pair(setup(language, 40), setup(language, 64)) as ranks:
            monkeypatch.setattr(service, "stretches", lambda own, *way: stretches([0] * len(own), *way))
            answer = await ranks.answer(question)
            assert answer[0] == asked.reference.answer[0]
            assert answer != asked.reference.answer
            end = await ranks.gateway.outcome()
            assert isinstance(end, Finished)
            assert end.reason is FinishReason.LENGTH

    run(scene())


@every_family
@pytest.mark.parametrize("service", [PrefillService, DecodeService, LanguageService])
def test_a_rank_builds_its_own_engine_from_the_checkpoint(
    service: Callable[[RankSpec], LanguageRank[Any, Any]], checkpoint: Path, tower: Tower
) -> None:
    """As the process of a rank does it: nothing is handed in but the spec, and the width of a tower's rows is known."""
    phases: list[str] = []

    async def scene() -> None:
        async with world() as ranks:
            spec = ranks.spec(Stage.LANGUAGE, Setup())
            config = msgspec.structs.replace(
                spec.config, model=model_config(checkpoint), engine=EngineConfig(kv_tokens=320)
            )
            rank = service(msgspec.structs.replace(spec, config=config))
            try:
                endpoints = await rank.start(lambda phase, _done, _total: phases.append(phase))
                assert endpoints.inbox is not None
                assert endpoints.transfer is not None
                assert rank.pulse().total_pages == 20
                assert rank.machine.loaded.width == tower.width
                rank.check()
            finally:
                await rank.close()

    run(scene())
    assert "weights" in phases


def test_a_checkpoint_that_is_not_there_is_a_load_error_and_leaves_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        async with world() as ranks:
            spec = ranks.spec(Stage.LANGUAGE, Setup())
            config = msgspec.structs.replace(spec.config, model=model_config(tmp_path / "nowhere"))
            rank = LanguageService(msgspec.structs.replace(spec, config=config))
            with pytest.raises(LoadError):
                await rank.start(lambda _phase, _done, _total: None)
            await rank.close()
            await until(lambda: "compute" not in [thread.name for thread in threading.enumerate()])

    run(scene())
