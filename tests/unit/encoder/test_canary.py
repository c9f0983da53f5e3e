"""When a rank proves itself, and what counts as a proof."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from PIL import Image

from epdctl.encoder.canary import MOST_LEFT_OUT, Watch
from epdctl.errors import EpdError, RequestError
from epdctl.families.samples import PNG
from epdctl.rank.service import Proof
from epdctl.wire.config import EncoderConfig
from tests.support.ranks import run

NOW = EncoderConfig(canary_deadline=0.0)
PATIENT = EncoderConfig(canary_deadline=60.0)


class Tower:
    """``norms`` are what the next canaries give; a callable is run first."""

    def __init__(self, *norms: float | Callable[[], Awaitable[float]]) -> None:
        self.norms = list(norms)
        self.made = 0
        self.proofs = 0

    async def measure(self) -> float:
        self.proofs += 1
        norm = self.norms.pop(0)
        value = norm if isinstance(norm, float) else await norm()
        self.made += 1
        return value


async def never() -> float:
    await asyncio.Event().wait()
    return 0.0


async def refused() -> float:
    raise RequestError(400, "torn")


def watching(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run(test())


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_a_tower_that_begins_with_no_numbers_never_becomes_ready(norm: float) -> None:
    tower = Tower(norm)
    with pytest.raises(EpdError, match="of the test item"):
        run(Watch(tower.measure, lambda: tower.made, PATIENT).calibrate())


@pytest.mark.parametrize(
    ("norm", "sick"), [(104.9, False), (95.1, False), (105.1, True), (math.nan, True), (0.0, True)]
)
def test_values_are_held_against_those_of_the_start(norm: float, sick: bool) -> None:
    async def test() -> None:
        tower = Tower(100.0, norm, 100.0)
        watch = Watch(tower.measure, lambda: tower.made, PATIENT)
        await watch.calibrate()
        await watch.check()
        assert (watch.reason is not None) == sick
        assert not sick or "at the start it was 100" in str(watch.reason)
        await watch.check()
        assert watch.reason is None, "a right answer mends it"

    watching(test)


def test_it_is_left_out_only_while_real_work_gets_done() -> None:
    async def test() -> None:
        tower = Tower(1.0, 1.0, 1.0)
        watch = Watch(tower.measure, lambda: tower.made, PATIENT)
        await watch.calibrate()
        tower.made += 1
        await watch.check()
        assert tower.proofs == 1
        await watch.check()  # work may be waiting by the hundred: nothing came of it
        assert tower.proofs == 2
        await watch.check()
        assert tower.proofs == 3, "its own proof is not real work"

    watching(test)


def test_no_answer_is_a_reason_unless_others_are_answered_meanwhile() -> None:
    async def test() -> None:
        tower = Tower(1.0, never, never)
        watch = Watch(tower.measure, lambda: tower.made, NOW)
        await watch.calibrate()

        async def overtaken() -> float:
            tower.made += 1
            return await never()

        tower.norms.insert(0, overtaken)
        await watch.check()
        assert watch.reason is None, "busy is not sick"
        await watch.check()
        assert watch.reason == "the test item was not encoded within 0 s"

    watching(test)


def test_once_sick_only_a_canary_mends_it_not_a_completion() -> None:
    async def test() -> None:
        tower = Tower(1.0, refused, 2.0, 1.0)
        watch = Watch(tower.measure, lambda: tower.made, PATIENT)
        await watch.calibrate()
        await watch.check()
        assert watch.reason == "the test item was refused: torn"
        tower.made += 1
        await watch.check()
        assert "has norm 2" in str(watch.reason)
        tower.made += 1
        await watch.check()
        assert watch.reason is None

    watching(test)


def test_it_is_proved_on_request_whatever_gets_done_and_being_busy_mends_nothing() -> None:
    async def test() -> None:
        tower = Tower(1.0, 0.0, never)
        watch = Watch(tower.measure, lambda: tower.made, NOW)
        await watch.calibrate()
        tower.made += 1  # a periodic check would be left out
        proof = await watch.prove()
        assert proof.fault == watch.reason == "the test item's embedding has norm 0; at the start it was 1"

        async def overtaken() -> float:
            tower.made += 1
            return await never()

        tower.norms.insert(0, overtaken)
        assert await watch.prove() == Proof(busy=True)
        assert watch.reason == proof.fault, "others got done, and nobody looked at what came of them"

    watching(test)


def test_a_rank_that_always_has_work_is_proved_all_the_same_now_and_then() -> None:
    """Zeros are finite: a tower that went blind under load was never found."""

    async def test() -> None:
        tower = Tower(1.0, 0.0)
        watch = Watch(tower.measure, lambda: tower.made, PATIENT)
        await watch.calibrate()
        for _ in range(MOST_LEFT_OUT):
            tower.made += 1
            await watch.check()
        assert tower.proofs == 1
        tower.made += 1
        await watch.check()
        assert "has norm 0" in str(watch.reason)

    watching(test)


def test_numbers_that_are_none_bring_the_canary_and_are_named_with_what_it_finds() -> None:
    async def test() -> None:
        tower = Tower(1.0, 1.0, math.nan)
        spoilt = [0]
        watch = Watch(tower.measure, lambda: tower.made, PATIENT, spoilt=lambda: spoilt[0])
        await watch.calibrate()
        tower.made += 1
        spoilt[0] = 1
        await watch.check()
        assert (tower.proofs, watch.reason) == (2, None), "that picture's own fault"
        tower.made += 1
        await watch.check()
        assert tower.proofs == 2
        tower.made += 1
        spoilt[0] = 3
        await watch.check()
        assert "has norm nan; at the start it was 1; 2 embeddings before it were not finite" in str(watch.reason)

    watching(test)


def test_the_picture_is_one() -> None:
    with Image.open(io.BytesIO(PNG)) as picture:
        picture.load()
        assert (picture.size, picture.mode) == ((32, 32), "RGB")
        assert len(picture.getcolors(maxcolors=2048) or ()) > 500
