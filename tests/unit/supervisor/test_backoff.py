from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epdctl.supervisor.backoff import delay
from epdctl.topology.plan import RestartPolicy

POLICY = RestartPolicy(initial=0.5, maximum=30.0, jitter=0.2)


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (10_000, 30.0)])
def test_it_doubles_up_to_the_maximum(attempt: int, seconds: float) -> None:
    assert delay(POLICY, attempt, 0.0) == seconds


@given(attempt=st.integers(1, 10**6), jitter=st.floats(-1, 1))
def test_jitter_stays_within_its_share(attempt: int, jitter: float) -> None:
    plain = delay(POLICY, attempt, 0.0)
    assert plain * 0.8 - 1e-9 <= delay(POLICY, attempt, jitter) <= plain * 1.2 + 1e-9


def test_jitter_is_used() -> None:
    assert delay(POLICY, 1, -1.0) < delay(POLICY, 1, 0.0) < delay(POLICY, 1, 1.0)
