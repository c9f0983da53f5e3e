"""Token for token what ``generate`` answers, along every way a request can travel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest

from epdctl.wire.control import RankStatus
from tests.support.cluster import Answer, Cluster, Part
from tests.support.reference import Tied, as_part, picture_bytes, reference_generate

TOKENS = 24
WORDS = "the quick brown fox jumps over the lazy dog while it rains in the garden behind our house "

Case = Callable[[int], list[Part]]  # seed → the parts of one message


def no_picture(seed: int) -> list[Part]:
    return [f"What would you say to friend number {seed}?"]


def one(seed: int) -> list[Part]:
    return ["Look at ", picture_bytes(seed, 64, 64), " and tell."]


def three_sizes(seed: int) -> list[Part]:
    sizes = [(56, 84), (112, 56), (140, 140)]
    return [part for n, size in enumerate(sizes) for part in (f"{n} then ", picture_bytes(seed + n, *size))]


def eight(seed: int) -> list[Part]:
    return [part for n in range(8) for part in (f"{n}: ", picture_bytes(seed + n, 56, 56))]


def beyond_the_chunk(seed: int) -> list[Part]:
    return [WORDS * 12, picture_bytes(seed, 168, 140), WORDS * 4]


CASES: list[Case] = [no_picture, one, three_sizes, eight, beyond_the_chunk]
MIXED: list[tuple[Case, int]] = [(CASES[n % 5], 100 + 10 * n) for n in range(16)]


class Truth:
    """What ``generate`` says, for the first seed whose answer is no tie."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self.of = cache(self._of)

    def _of(self, case: Case, first_seed: int = 0) -> tuple[list[Part], Answer]:
        for seed in range(first_seed, first_seed + 10):
            try:
                return case(seed), self.generate(case(seed))
            except Tied:
                continue
        raise AssertionError(f"{case.__name__}: ten ties in a row")

    def generate(self, parts: Sequence[Part]) -> Answer:
        content = [{"type": "text", "text": part} if isinstance(part, str) else as_part(part) for part in parts]
        media = [part for part in parts if isinstance(part, bytes)]
        truth = reference_generate(self._checkpoint, [{"role": "user", "content": content}], media, TOKENS)
        ended = len(truth.answer) < TOKENS
        sent = truth.answer[:-1] if ended else truth.answer
        return Answer(truth.text, "stop" if ended else "length", len(truth.prompt), len(truth.answer), tuple(sent))


@pytest.fixture(scope="session")
def truth(checkpoint: Path) -> Truth:
    return Truth(checkpoint)


@pytest.fixture(scope="module", params=["epd", "language", "mono"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Cluster)
    return found


def test_the_truth_depends_on_each_picture_and_on_their_order(truth: Truth) -> None:
    parts, answer = truth.of(eight)
    for n in range(8):
        changed = [*parts]
        changed[2 * n + 1] = picture_bytes(900 + n, 56, 56)
        assert truth.generate(changed).token_ids != answer.token_ids, f"picture {n} does not matter"
    swapped = [*parts]
    swapped[1], swapped[15] = parts[15], parts[1]
    assert truth.generate(swapped).token_ids != answer.token_ids


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [Cluster.ask, Cluster.ask_streaming], ids=["whole", "streamed"])
def test_equals_generate(
    cluster: Cluster, truth: Truth, case: Case, way: Callable[[Cluster, list[Part]], Answer]
) -> None:
    parts, answer = truth.of(case)
    assert way(cluster, parts) == answer


def test_sixteen_mixed_at_once(cluster: Cluster, truth: Truth) -> None:
    known = [truth.of(case, seed) for case, seed in MIXED]
    with ThreadPoolExecutor(len(known)) as pool:
        answers = list(pool.map(cluster.ask, [parts for parts, _ in known]))
    assert answers == [answer for _, answer in known]


def test_a_swap_or_a_change_of_pictures_shows_through_the_cluster(cluster: Cluster, truth: Truth) -> None:
    parts, answer = truth.of(three_sizes)
    swapped = [*parts]
    swapped[1], swapped[3] = parts[3], parts[1]
    assert cluster.ask(swapped).token_ids != answer.token_ids


def test_a_seeded_answer_is_the_same_alone_and_in_company(cluster: Cluster, truth: Truth) -> None:
    check_seeded(cluster, truth)


def check_seeded(cluster: Cluster, truth: Truth) -> None:
    parts, greedy = truth.of(one)
    options = {"temperature": 1.0, "seed": 7}
    alone = cluster.ask(parts, **options)
    assert alone.token_ids != greedy.token_ids
    assert cluster.ask(parts, temperature=1.0, seed=8).token_ids != alone.token_ids
    with ThreadPoolExecutor(8) as pool:
        company = [pool.submit(cluster.ask, case(seed), temperature=1.0, seed=seed) for case, seed in MIXED[:7]]
        assert pool.submit(cluster.ask, parts, **options).result() == alone
        for other in company:
            other.result()


def test_eight_pictures_use_both_encoder_ranks(epd: Cluster, truth: Truth) -> None:
    before = {name: epd.rank(name)["completed"] for name in ("encoder/0", "encoder/1")}
    epd.ask(truth.of(eight)[0])
    for name, count in before.items():
        epd.wait(name, partial(advanced, beyond=count))


def advanced(rank: RankStatus, *, beyond: int) -> bool:
    return (rank.completed or 0) > beyond
