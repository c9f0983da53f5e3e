"""The families beside Qwen2.5-VL, each through encoder, prefill and decode, and through encoder and language: token by
token what ``generate`` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import CHUNK, running
from tests.e2e.test_parity import CASES, MIXED, Case, Truth, check_seeded, eight, no_picture
from tests.support.checkpoints import NEWER, tiny_checkpoint
from tests.support.cluster import GUARD_SECONDS, LANGUAGE, TRIO, Answer, Cluster, Part, parse
from tests.support.reference import picture_bytes


def wide_and_alone(seed: int) -> list[Part]:
    """Alone, LLaVA-OneVision cuts it into more tiles than it keeps the patches of."""
    return [picture_bytes(seed, 230, 210), "What do you see?"]


@pytest.fixture(scope="module", params=NEWER)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory, family=request.param)


@cache
def truth_of(model: Path) -> Truth:
    """Kept while the other family has its turn."""
    return Truth(model)


@pytest.fixture(scope="module")
def truth(model: Path) -> Truth:
    return truth_of(model)


@pytest.fixture(scope="module", params=[TRIO, LANGUAGE], ids=["epd", "language"])
def cluster(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One at a time: at most three processes with torch."""
    topology = request.param.format(model=model, chunk=CHUNK)
    yield from running(Cluster(tmp_path_factory.mktemp("f"), topology, name="family"))


def test_the_truth_depends_on_each_picture_and_on_their_order(truth: Truth) -> None:
    parts, answer = truth.of(eight)
    for n in range(8):
        changed = [*parts]
        changed[2 * n + 1] = picture_bytes(900 + n, 56, 56)
        assert truth.generate(changed).token_ids != answer.token_ids, f"picture {n} does not matter"
    swapped = [*parts]
    swapped[1], swapped[15] = parts[15], parts[1]
    assert truth.generate(swapped).token_ids != answer.token_ids


@pytest.mark.parametrize("case", [*CASES, wide_and_alone])
@pytest.mark.parametrize("way", [Cluster.ask, Cluster.ask_streaming], ids=["whole", "streamed"])
def test_equals_generate(
    cluster: Cluster, truth: Truth, case: Case, way: Callable[[Cluster, list[Part]], Answer]
) -> None:
    parts, answer = truth.of(case)
    assert way(cluster, parts) == answer


def test_sixteen_mixed_at_once(cluster: Cluster, truth: Truth) -> None:
    known = [truth.of(case, seed) for case, seed in MIXED]
    with ThreadPoolExecutor(len(known)) as pool:
        answers: list[Answer] = list(pool.map(cluster.ask, [parts for parts, _ in known]))
    assert answers == [answer for _, answer in known]


def test_a_seeded_answer_is_the_same_alone_and_in_company(cluster: Cluster, truth: Truth) -> None:
    check_seeded(cluster, truth)


def test_a_message_of_plain_words_reaches_the_model(cluster: Cluster, truth: Truth) -> None:
    """A content that is a string: LLaVA-OneVision's template would pass over it."""
    parts, answer = truth.of(no_picture)
    (words,) = parts
    body = cluster.body([]) | {"messages": [{"role": "user", "content": words}]}
    reply = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=GUARD_SECONDS)
    assert parse(reply.json()) == answer
