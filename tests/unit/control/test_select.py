"""Which ranks a selector means."""

from __future__ import annotations

import pytest

from epdctl.control.select import select
from epdctl.errors import SelectorError
from epdctl.ids import RankName

RANKS = [RankName(name) for name in ("gateway/0", "encoder/0", "encoder/1", "prefill/0.0", "prefill/0.1", "decode/0")]


@pytest.mark.parametrize(
    ("selectors", "meant"),
    [
        ([], RANKS),
        (["all"], RANKS),
        (["encoder"], ["encoder/0", "encoder/1"]),
        (["decode/0", "encoder/1", "encoder"], ["encoder/0", "encoder/1", "decode/0"]),
        (["prefill/0"], ["prefill/0.0", "prefill/0.1"]),
        (["prefill/0.1"], ["prefill/0.1"]),
    ],
)
def test_each_rank_meant_is_named_once_in_the_order_of_the_plan(selectors: list[str], meant: list[str]) -> None:
    assert select(selectors, RANKS) == meant


@pytest.mark.parametrize(
    ("selector", "hint"),
    [("encoder/2", "encoder/"), ("decoder", "did you mean"), ("zzz", "there are: gateway, encoder, prefill, decode")],
)
def test_a_selector_without_a_match_is_refused_with_what_may_be_meant(selector: str, hint: str) -> None:
    with pytest.raises(SelectorError, match=selector) as refused:
        select(["encoder/0", selector], RANKS)
    assert hint in (refused.value.hint or "")
