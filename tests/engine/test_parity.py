"""Token for token what ``generate`` answers, however the question travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from epdctl.engine.api import LanguageModel, Tower
from epdctl.wire.serve import FinishReason, Sampling
from tests.engine.harness import Case, Recorder, Run, ask, pictures, question, untied
from tests.support.checkpoints import every_family, model_config

pytestmark = every_family

EIGHT = [(140, 140), (112, 168), (200, 90), (84, 84), (168, 56), (99, 131), (140, 112), (60, 180)]


def no_picture(seed: int) -> Case:
    return Case((f"How many shapes are there, and which of them is larger? Number {seed}.",), 24)


def one_picture(seed: int) -> Case:
    return Case((*pictures(seed, [(150, 120)]), "What is in this picture?"), 24)


def one_large_picture(seed: int) -> Case:
    return Case((*pictures(seed, [(230, 220)]), "What is in this large picture?"), 16)


def three_between_text(seed: int) -> Case:
    first, second, third = pictures(seed, [(140, 100), (60, 200), (224, 168)])
    return Case(("The first is ", first, " and then comes ", second, third, ". Which is darker?"), 24)


def eight_pictures(seed: int) -> Case:
    return Case((*pictures(seed, EIGHT), "Describe the difference between these pictures."), 16)


def long_prompt(seed: int) -> Case:
    words = "Somebody left a bicycle near the door of the house. " * 6
    first, second = pictures(seed, [(300, 200), (180, 260)])
    return Case((words, first, words, second, "Where does the light come from?"), 16)


def mixed(number: int) -> Callable[[int], Case]:
    def build(seed: int) -> Case:
        shapes = [(84 + 11 * number, 140), (112, 84 + 7 * number), (90, 90)][: number % 4]
        files = pictures(100 * number + seed + 1, shapes)
        return Case((*files, f"Question {number}, " + "and so on " * (3 * number % 17)), 5 + number % 13)

    return build


CASES = [no_picture, one_picture, one_large_picture, three_between_text, eight_pictures, long_prompt]


@pytest.mark.parametrize("build", CASES)
def test_the_answer_is_that_of_generate(
    build: Callable[[int], Case], checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    asked = question(build, checkpoint, tower)
    assert ask(language, asked) == asked.reference.answer


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 33])
def test_a_prompt_in_chunks_is_answered_the_same(
    chunk_tokens: int, checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    build = three_between_text if chunk_tokens < 16 else long_prompt
    asked = question(build, checkpoint, tower)
    assert len(asked.tokens) > 4 * chunk_tokens
    assert ask(language, asked, chunk_tokens=chunk_tokens) == asked.reference.answer


def test_logits_are_within_a_ten_thousandth(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = question(three_between_text, checkpoint, tower)
    recorder = Recorder(language)
    assert ask(recorder, asked, chunk_tokens=50) == asked.reference.answer
    logits = torch.cat([rows for rows in recorder.logits if len(rows)])
    assert logits.shape == asked.reference.logits.shape
    assert float((logits - asked.reference.logits).abs().max()) < 1e-4


def test_a_changed_picture_and_a_changed_order_change_the_answer(checkpoint: Path) -> None:
    first, second, other = pictures(3, [(140, 140), (140, 140), (140, 140)])

    def answer(one: bytes, two: bytes) -> list[int]:
        _, reference = untied(lambda seed: Case((one, two, f"What is this? {seed}"), 12), checkpoint)
        return reference.answer

    base = answer(first, second)
    assert answer(other, second) != base
    assert answer(first, other) != base
    assert answer(second, first) != base


def test_sixteen_at_once_with_chance_arrivals(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = {f"q{number}": question(mixed(number), checkpoint, tower) for number in range(16)}
    run = Run.make(language, chunk_tokens=64, max_batch=6)
    arrivals = torch.randperm(48, generator=torch.Generator().manual_seed(5))[:16].tolist()
    waiting = sorted(zip(arrivals, asked, strict=True))
    clock = 0
    while waiting or run.engine.has_work:
        while waiting and waiting[0][0] <= clock:
            name = waiting.pop(0)[1]
            run.admit(name, asked[name])
        run.step()
        clock += 1
    assert run.answers == {name: each.reference.answer for name, each in asked.items()}
    assert any(len({a.prompt_done for a in advances}) == 2 for advances in run.advances), "no step was ever mixed"
    assert run.allocator.free == run.allocator.total


def test_decode_takes_over_pages_that_another_pool_filled(
    checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    asked = question(three_between_text, checkpoint, tower)
    prefill, decode = Run.make(language, chunk_tokens=40), Run.make(language, pages=64)
    decode.take_pages("someone else", 100)  # so that page numbers differ
    prefill.admit("r", asked, max_new_tokens=1, pages=(source := prefill.take_pages("r", len(asked.tokens))))
    prefill.finish()
    assert prefill.finished == {"r": FinishReason.LENGTH}
    (first,) = prefill.answers["r"]
    left = len(asked.reference.answer) - 1
    target = decode.take_pages("r", len(asked.tokens) + 1 + left)
    for here, there in zip(source, target, strict=False):
        decode.engine.kv.view[there].copy_(prefill.engine.kv.view[here])
    prefill.engine.kv.memory.fill_(255)  # nothing may be read from the old pool any more
    decode.admit(
        "r",
        replace(asked, items=[], embeddings={}),
        tokens=[*asked.tokens, first],
        computed=len(asked.tokens),
        rope_delta=prefill.deltas["r"],
        max_new_tokens=left,
        pages=target,
    )
    decode.finish()
    assert (prefill.deltas["r"] < 0) == model_config(checkpoint).family.startswith("qwen")
    assert [first, *decode.answers["r"]] == asked.reference.answer


def test_an_answer_taken_up_again_goes_on_as_before(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = question(one_picture, checkpoint, tower)
    for said in (1, 5):
        begun = replace(
            asked,
            tokens=[*asked.tokens, *asked.reference.answer[:said]],
            max_new_tokens=asked.max_new_tokens - said,
        )
        assert ask(language, begun) == asked.reference.answer[said:]


def test_a_sampled_answer_does_not_depend_on_its_company(
    checkpoint: Path, tower: Tower, language: LanguageModel
) -> None:
    asked = question(one_picture, checkpoint, tower)
    sampled = replace(asked, sampling=Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=7))
    alone = ask(language, sampled)
    other_seed = ask(language, replace(asked, sampling=Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=8)))
    run = Run.make(language, chunk_tokens=32)
    for number in range(5):
        run.admit(f"other {number}", question(mixed(number), checkpoint, tower))
    run.step()
    run.admit("sampled", sampled)
    run.finish()
    assert run.answers["sampled"] == alone
    assert alone not in (asked.reference.answer, other_seed)
    resumed = replace(sampled, tokens=[*asked.tokens, *alone[:4]], max_new_tokens=asked.max_new_tokens - 4)
    assert ask(language, resumed) == alone[4:]


def test_end_tokens_end_the_answer(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    asked = question(no_picture, checkpoint, tower)
    third = asked.reference.answer[2]
    until = asked.reference.answer.index(third) + 1
    run = Run.make(language)
    run.admit("stops", replace(asked, sampling=Sampling(stop_token_ids=[third])))
    run.admit("goes on", replace(asked, sampling=Sampling()))
    run.finish()
    assert run.finished == {"stops": FinishReason.STOP, "goes on": FinishReason.LENGTH}
    assert run.answers["stops"] == asked.reference.answer[:until]
    assert run.answers["goes on"] == asked.reference.answer


def test_two_engines_in_one_process_do_not_meet(checkpoint: Path, tower: Tower, language: LanguageModel) -> None:
    one, two = question(one_picture, checkpoint, tower), question(no_picture, checkpoint, tower)
    left, right = Run.make(language, chunk_tokens=20), Run.make(language)
    left.admit("a", one)
    right.admit("b", two)
    while left.engine.has_work or right.engine.has_work:
        left.step()
        right.step()
    assert left.answers["a"] == one.reference.answer
    assert right.answers["b"] == two.reference.answer
