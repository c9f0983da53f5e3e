"""What an encoder's messages do not let through."""

from __future__ import annotations

import math

import pytest

from epdctl.errors import BadMessage
from epdctl.ids import Modality, RequestId
from epdctl.wire.encode import CLIENT_TO_ROUTER, MAX_BUDGET_SECONDS, Encode, MediaItem


def encode(budget_s: float) -> Encode:
    item = MediaItem(index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2], rows=1)
    return Encode(request=RequestId("r"), attempt=1, item=item, slot=None, notify="", budget_s=budget_s)


@pytest.mark.parametrize("budget", [math.nan, math.inf, -1.0, MAX_BUDGET_SECONDS + 1])
def test_a_budget_that_would_never_end_is_refused(budget: float) -> None:
    with pytest.raises(BadMessage, match="budget_s"):
        CLIENT_TO_ROUTER.decode(CLIENT_TO_ROUTER.encode(encode(budget)))


@pytest.mark.parametrize("budget", [0.0, 0.5, MAX_BUDGET_SECONDS])
def test_any_other_is_not(budget: float) -> None:
    assert CLIENT_TO_ROUTER.decode(CLIENT_TO_ROUTER.encode(encode(budget))) == encode(budget)
