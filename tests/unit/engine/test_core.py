"""The engine over a language model of one line: the next token follows from all that stands in the pages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epdctl.engine.api import Advance, NewSequence, StepInput
from epdctl.engine.core import Engine
from epdctl.engine.kv import KvPool
from epdctl.engine.pages import PageAllocator, pages_for
from epdctl.errors import RequestError
from epdctl.ids import Modality
from epdctl.wire.config import EngineConfig
from epdctl.wire.serve import FinishReason, KvLayout, PromptItem, Sampling

VOCAB, PAGE = 31, 4


class SumModel:
    """Keeps each token's value in the pages; says the weighted sum of all of them, modulo the vocabulary."""

    device = torch.device("cpu")
    vocab_size = VOCAB
    hidden_size = 1
    row_width = 1

    def layout(self, page_size: int) -> KvLayout:
        return KvLayout(page_size=page_size, layers=1, kv_heads=1, head_dim=1, dtype="float32")

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.float32).unsqueeze(1)

    def positions(self, tokens: Sequence[int], items: Sequence[PromptItem]) -> tuple[torch.Tensor, int]:
        return torch.arange(len(tokens)).expand(3, -1), -sum(item.rows for item in items)

    def forward(self, step: StepInput) -> torch.Tensor:
        values = (step.embeds * (1 + step.positions[0].unsqueeze(1) % 7)).unsqueeze(2)
        step.paged.write(0, values, values)
        sums = []
        for reach in step.paged.reaches:
            running = step.paged.read(0, reach)[0].flatten().cumsum(0)
            sums.append(running[reach.length - (reach.rows.stop - reach.rows.start) :])
        wanted = torch.cat(sums)[step.wanted]
        logits = torch.zeros(len(wanted), VOCAB)
        logits[torch.arange(len(wanted)), (wanted.nan_to_num(0) % VOCAB).long()] = 1.0
        return torch.where(wanted.isfinite().unsqueeze(1), logits, torch.nan)


def answer(tokens: Sequence[int], count: int) -> list[int]:
    """What SumModel says after ``tokens``, worked out without an engine."""
    known = list(tokens)
    for _ in range(count):
        known.append(sum(token * (1 + index % 7) for index, token in enumerate(known)) % VOCAB)
    return known[len(tokens) :]


def engine(pages: int = 64, chunk_tokens: int = 8, max_batch: int = 4) -> Engine:
    model = SumModel()
    config = EngineConfig(page_size=PAGE, chunk_tokens=chunk_tokens, max_batch=max_batch)
    return Engine(model, KvPool(model.layout(PAGE), pages), config)


def new(name: str = "a", tokens: Sequence[int] = (1, 2, 3), count: int = 4, first_page: int = 0) -> NewSequence:
    pages = range(first_page, first_page + pages_for(len(tokens) + count, PAGE))
    return NewSequence(id=name, tokens=tokens, sampling=Sampling(), pages=pages, max_new_tokens=count)


def finish(subject: Engine) -> list[Advance]:
    advances = []
    while subject.has_work:
        advances += subject.step()
        subject.check()
    return advances


def tokens_of(advances: Sequence[Advance], name: str) -> list[int]:
    return [each.token for each in advances if each.id == name and each.token is not None]


def test_a_prompt_in_chunks_says_how_far_it_is() -> None:
    subject = engine(chunk_tokens=4)
    subject.admit(new(tokens=range(1, 11), count=2))
    advances = finish(subject)
    assert [(each.computed, each.prompt_done, each.token is None) for each in advances] == [
        (4, False, True),
        (8, False, True),
        (10, True, False),
        (11, True, False),
    ]
    assert advances[-1].finished is FinishReason.LENGTH
    assert tokens_of(advances, "a") == answer(range(1, 11), 2)


def test_a_seat_is_kept_and_the_next_in_line_takes_it() -> None:
    subject = engine(max_batch=1)
    subject.admit(new("first"))
    subject.admit(new("second", first_page=8))
    names = [each.id for each in finish(subject)]
    assert names == ["first"] * 4 + ["second"] * 4


def test_a_sequence_whose_tokens_are_computed_goes_on_from_the_pages() -> None:
    subject = engine()
    subject.admit(new(count=1))
    (advance,) = finish(subject)
    assert advance.token is not None
    known = [1, 2, 3, advance.token]
    subject.admit(replace(new(tokens=known, count=3), computed=3))
    assert tokens_of(finish(subject), "a") == answer(known, 3)


def test_embeddings_take_the_place_of_placeholders_in_every_chunk() -> None:
    subject = engine(chunk_tokens=2)
    item = PromptItem(index=0, modality=Modality.IMAGE, grid=[1, 2, 10], offset=2, rows=5)
    rows = torch.tensor([[4.0], [5.0], [6.0], [7.0], [8.0]])
    asked = new(tokens=[1, 2, 0, 0, 0, 0, 0, 3], count=2)
    subject.admit(replace(asked, items=[item], embeddings={0: rows}))
    advances = finish(subject)
    assert tokens_of(advances, "a")[0] == answer([1, 2, 4, 5, 6, 7, 8, 3], 1)[0]
    assert {each.rope_delta for each in advances} == {-5}


def test_one_whose_numbers_are_none_fails_alone_and_leaves_no_trace() -> None:
    subject = engine()
    item = PromptItem(index=0, modality=Modality.IMAGE, grid=[1, 2, 2], offset=0, rows=1)
    poisoned = replace(new("bad", [0, 5]), items=[item], embeddings={0: torch.tensor([[torch.nan]])})
    subject.admit(poisoned)
    subject.admit(new("good", first_page=8))
    advances = finish(subject)
    (failed,) = [each for each in advances if each.failed is not None]
    assert (failed.id, failed.token, failed.finished) == ("bad", None, None)
    assert "not finite" in str(failed.failed)
    assert tokens_of(advances, "good") == answer([1, 2, 3], 4)
    subject.admit(new("after", [9, 9]))  # in the pages of the poisoned one
    assert tokens_of(finish(subject), "after") == answer([9, 9], 4)


def test_abort_forgets_and_does_not_mind_strangers() -> None:
    subject = engine()
    subject.admit(new())
    subject.step()
    subject.abort("a")
    subject.abort("nobody")
    assert not subject.has_work
    assert subject.step() == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (replace(new(), pages=[0]), "needs 2"),
        (replace(new(), pages=[0, 64]), "pages of 64"),
        (replace(new(), computed=3), "nothing to do"),
        (replace(new(), tokens=[]), "nothing to do"),
        (replace(new(), max_new_tokens=0), "nothing to do"),
        (new("there"), "here already"),
        (
            replace(new(), items=[PromptItem(index=0, modality=Modality.IMAGE, grid=[1, 2, 2], offset=0, rows=1)]),
            "no embed",
        ),
    ],
)
def test_a_callers_mistake_is_refused_before_it_does_harm(wrong: NewSequence, said: str) -> None:
    subject = engine()
    subject.admit(new("there", first_page=8))
    with pytest.raises(ValueError, match=said):
        subject.admit(wrong)
    assert {each.id for each in finish(subject)} == {"there"}


@pytest.mark.parametrize(
    "wrong",
    [
        replace(new(), tokens=[1, VOCAB, 2]),
        replace(new(), tokens=[1, -1, 2]),
        replace(new(), items=[PromptItem(index=0, modality=Modality.IMAGE, grid=[1, 2, 2], offset=2, rows=2)]),
        replace(
            new(),
            items=[PromptItem(index=0, modality=Modality.IMAGE, grid=[1, 2, 2], offset=0, rows=1)],
            embeddings={0: torch.zeros(2, 1)},
        ),
    ],
)
def test_a_prompt_the_model_cannot_take_is_a_400(wrong: NewSequence) -> None:
    with pytest.raises(RequestError) as caught:
        engine().admit(wrong)
    assert caught.value.status == 400


def test_check_sees_shared_pages() -> None:
    subject = engine()
    subject.admit(new("a"))
    subject.admit(new("b"))
    with pytest.raises(AssertionError, match="share"):
        subject.check()


ASKED = st.lists(st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), st.integers(1, 6)), max_size=9)


@settings(max_examples=60, deadline=None)
@given(ASKED, st.integers(1, 12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_any_walk_of_arrivals_aborts_and_steps_answers_right(
    asked: list[tuple[list[int], int]], chunk_tokens: int, max_batch: int, draw: random.Random
) -> None:
    subject, allocator = engine(48, chunk_tokens, max_batch), PageAllocator(48)
    waiting = {str(number): each for number, each in enumerate(asked)}
    pages: dict[str, tuple[int, ...]] = {}
    said: dict[str, list[int]] = {}
    while waiting or subject.has_work:
        if waiting and draw.random() < 0.4:
            name = next(iter(waiting))
            tokens, count = waiting[name]
            if pages_for(len(tokens) + count, PAGE) <= allocator.free:
                pages[name], said[name] = allocator.take(pages_for(len(tokens) + count, PAGE)), []
                subject.admit(replace(new(name, tokens, count), pages=pages[name]))
                del waiting[name]
        elif pages and draw.random() < 0.05:
            name = draw.choice(list(pages))
            subject.abort(name)
            allocator.give(pages.pop(name))
            del said[name]
        for each in subject.step():
            said[each.id] += [] if each.token is None else [each.token]
            if each.finished:
                allocator.give(pages.pop(each.id))
        subject.check()
        allocator.check()
    assert allocator.free == 48
    assert said == {name: answer(*asked[int(name)]) for name in said}
