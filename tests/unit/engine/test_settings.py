"""Penalties, bias, forbidden ends and log-probabilities: pure functions of logits and of the tokens so far."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import MinLengthLogitsProcessor, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from epdctl.engine.sampler import draw
from epdctl.engine.settings import Ask, adjusted, likelihoods
from epdctl.wire.serve import Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.0])
PROMPT, ANSWER = [0, 1, 1], [2, 2, 4]
TOKENS = PROMPT + ANSWER


def changed(**settings: object) -> list[float]:
    sampling = Sampling(answer_from=len(PROMPT), **settings)  # type: ignore[arg-type]
    found: list[float] = adjusted(LOGITS[None], [Ask(sampling, TOKENS)])[0].tolist()
    return found


def drawn(sampling: Sampling, tokens: Sequence[int] = TOKENS) -> int | None:
    return draw(LOGITS[None], [Ask(sampling, tokens)])[0].token


def test_nothing_asked_for_changes_nothing() -> None:
    rows = LOGITS[None]
    assert adjusted(rows, [Ask(Sampling(temperature=0.7, top_k=3, min_p=0.1), TOKENS)]) is rows


def test_presence_and_frequency_look_at_the_answer_alone() -> None:
    assert changed(presence_penalty=0.5) == pytest.approx([2.0, -1.0, 0.0, 0.0, -3.5, 1.0])
    assert changed(frequency_penalty=0.5) == pytest.approx([2.0, -1.0, -0.5, 0.0, -3.5, 1.0])
    assert changed(frequency_penalty=-1.0) == pytest.approx([2.0, -1.0, 2.5, 0.0, -2.0, 1.0])


def test_repetition_looks_at_the_prompt_too_and_equals_transformers() -> None:
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([TOKENS]), LOGITS[None].clone())[0]
    assert changed(repetition_penalty=1.5) == pytest.approx(theirs.tolist())


def test_ends_are_forbidden_until_the_answer_is_long_enough() -> None:
    theirs = MinLengthLogitsProcessor(len(PROMPT) + 4, [0, 5])(torch.tensor([TOKENS]), LOGITS[None].clone())[0]
    assert changed(min_tokens=4, stop_token_ids=[0, 5]) == theirs.tolist()
    assert changed(min_tokens=3, stop_token_ids=[0, 5]) == LOGITS.tolist()


def test_bias_is_added() -> None:
    assert changed(logit_bias={3: 5.0, 99: 1.0}) == [2.0, -1.0, 0.5, 5.0, -3.0, 1.0]
    assert drawn(Sampling(logit_bias={3: 5.0})) == 3
    assert drawn(Sampling(logit_bias={0: -100.0})) == 5


def test_the_original_stays_as_it_is() -> None:
    before = LOGITS.clone()
    changed(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 1.0})
    assert torch.equal(LOGITS, before)


def test_an_answer_taken_up_again_counts_what_was_answered_before() -> None:
    """The second attempt's prompt ends with the first one's answer: ``answer_from`` tells them apart."""
    asks = [Ask(Sampling(answer_from=start, presence_penalty=1.0), TOKENS) for start in (3, 6)]
    whole, later = adjusted(LOGITS.expand(2, -1), asks)
    assert not torch.equal(whole, later)


def test_each_row_gets_what_it_asked_for_and_nothing_of_its_neighbours() -> None:
    draw_settings = random.Random(2)
    rows = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    asks = [Ask(some_settings(draw_settings), draw_settings.choices(range(43), k=30)) for _ in rows]
    together = adjusted(rows, asks)
    for row, ask, found in zip(rows, asks, together, strict=True):
        assert torch.equal(found, adjusted(row[None], [ask])[0])
        assert torch.allclose(found, plainly(row, ask), rtol=1e-6)


def some_settings(draw_settings: random.Random) -> Sampling:
    choose = draw_settings.choice
    return Sampling(
        answer_from=20,
        presence_penalty=choose([0.0, 0.7]),
        frequency_penalty=choose([0.0, -0.4]),
        repetition_penalty=choose([1.0, 1.4]),
        logit_bias=choose([{}, {3: 2.0, 41: 1.0}]),
        min_tokens=choose([0, 10, 11]),
        stop_token_ids=[0, 7, 42],
    )


def plainly(row: torch.Tensor, ask: Ask) -> torch.Tensor:
    """One token at a time. Ids from 40 on are beyond the vocabulary."""
    scores, sampling, answer = row.tolist(), ask.sampling, list(ask.tokens[ask.sampling.answer_from :])
    for token, score in enumerate(scores):
        if token in sampling.stop_token_ids and len(answer) < sampling.min_tokens:
            score = -math.inf
        score += sampling.logit_bias.get(token, 0.0)
        if token in ask.tokens:
            score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
        if token in answer:
            score -= answer.count(token) * sampling.frequency_penalty + sampling.presence_penalty
        scores[token] = score
    return torch.tensor(scores)


def test_min_p_keeps_what_transformers_keeps() -> None:
    kept = torch.isfinite(MinPLogitsWarper(0.2)(torch.tensor([TOKENS]), LOGITS[None].clone())[0])
    found = {drawn(Sampling(temperature=1.0, min_p=0.2), range(position)) for position in range(600)}
    assert found == set(torch.nonzero(kept).flatten().tolist())
    assert 1 < len(found) < len(LOGITS)


def test_logprobs_are_the_models_own() -> None:
    found, bare, all_of_them = likelihoods(LOGITS.expand(3, -1), [3, 3, 0], [2, 0, 20])
    expected = torch.log_softmax(LOGITS, -1)
    assert found.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in found.top] == [0, 5]
    assert [value for _, value in found.top] == pytest.approx([float(expected[0]), float(expected[5])])
    assert (bare.logprob, bare.top) == (found.logprob, [])
    assert all_of_them.logprob == pytest.approx(float(expected[0]))
    assert len(all_of_them.top) == len(LOGITS)


def test_only_those_who_ask_are_told_logprobs() -> None:
    asks = [Ask(Sampling(logprobs=top, logit_bias={1: 50.0}), TOKENS) for top in (None, 1, None, 0)]
    first, second, third, fourth = draw(LOGITS.expand(4, -1), asks)
    assert (first.likelihood, third.likelihood) == (None, None)
    assert second.likelihood is not None
    ((token, value),) = second.likelihood.top
    assert token == 0
    assert value == pytest.approx(float(torch.log_softmax(LOGITS, -1)[0]))
    assert fourth.likelihood is not None
    assert fourth.likelihood.logprob == pytest.approx(float(torch.log_softmax(LOGITS, -1)[1]))
