"""Penalties, bias, forbidden ends and log-probabilities: pure functions of logits and of the tokens so far."""

from __future__ import annotations

import pytest
import torch
from transformers import MinLengthLogitsProcessor, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from epdctl.engine.sampler import draw, sample
from epdctl.engine.settings import adjusted, likelihood
from epdctl.wire.serve import Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.0])
PROMPT, ANSWER = [0, 1, 1], [2, 2, 4]
TOKENS = PROMPT + ANSWER


def changed(**settings: object) -> list[float]:
    found: list[float] = adjusted(LOGITS, Sampling(answer_from=len(PROMPT), **settings), TOKENS).tolist()  # type: ignore[arg-type]
    return found


def test_nothing_asked_for_changes_nothing() -> None:
    assert adjusted(LOGITS, Sampling(temperature=0.7, top_k=3, min_p=0.1), TOKENS) is LOGITS


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
    assert draw(LOGITS, Sampling(logit_bias={3: 5.0}), TOKENS) == 3
    assert draw(LOGITS, Sampling(logit_bias={0: -100.0}), TOKENS) == 5


def test_the_original_stays_as_it_is() -> None:
    before = LOGITS.clone()
    changed(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 1.0})
    assert torch.equal(LOGITS, before)


def test_an_answer_taken_up_again_counts_what_was_answered_before() -> None:
    """The second attempt's prompt ends with the first one's answer: ``answer_from`` tells them apart."""
    whole = adjusted(LOGITS, Sampling(answer_from=3, presence_penalty=1.0), TOKENS)
    assert not torch.equal(whole, adjusted(LOGITS, Sampling(answer_from=6, presence_penalty=1.0), TOKENS))


def test_min_p_keeps_what_transformers_keeps() -> None:
    kept = torch.isfinite(MinPLogitsWarper(0.2)(torch.tensor([TOKENS]), LOGITS[None].clone())[0])
    drawn = {sample(LOGITS, Sampling(temperature=1.0, min_p=0.2), position) for position in range(600)}
    assert drawn == set(torch.nonzero(kept).flatten().tolist())
    assert 1 < len(drawn) < len(LOGITS)


def test_logprobs_are_the_models_own() -> None:
    found = likelihood(LOGITS, 3, 2)
    expected = torch.log_softmax(LOGITS, -1)
    assert found.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in found.top] == [0, 5]
    assert [value for _, value in found.top] == pytest.approx([float(expected[0]), float(expected[5])])
    assert likelihood(LOGITS, 3, 0).top == []
    assert len(likelihood(LOGITS, 3, 20).top) == len(LOGITS)
