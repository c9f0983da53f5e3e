"""Captures against deadlines, with ranks that are only names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from epdctl.errors import UserError
from epdctl.ids import Incarnation, RankName
from epdctl.supervisor.captures import Captures, Deadlines
from epdctl.wire.control import StartCaptures
from epdctl.wire.lifecycle import CaptureWritten, ClockTold, StartCapture, StopCapture, SupervisorToRank, TellClock
from epdctl.wire.trace import MergedSource, MergeOrder, MergeReport

GATEWAY, ENCODER, DECODE = RankName("gateway/0"), RankName("encoder/0"), RankName("decode/0")
FIRST = Incarnation(1)
QUICK = Deadlines(clocks=0.01)  # nobody here answers


class Studio:
    """Everyone is connected; what they are told is kept. It merges by writing down what it was to merge."""

    cluster = "studio"

    def __init__(self) -> None:
        self.told: list[tuple[RankName, SupervisorToRank]] = []
        self.stopped = asyncio.Event()
        self.merges: list[MergeOrder] = []
        self.report = MergeReport(sources=[])

    def connected(self, rank: RankName) -> Incarnation | None:
        return FIRST

    def tell(self, rank: RankName, message: SupervisorToRank) -> None:
        self.told.append((rank, message))
        if isinstance(message, StopCapture):
            self.stopped.set()

    def note(self, text: str) -> None:
        pass

    async def merge(self, order: MergeOrder, seconds: float) -> MergeReport:
        self.merges.append(order)
        return self.report

    def captures(self, folder: Path, deadlines: Deadlines = QUICK) -> Captures:
        return Captures(self, folder, self.merge, deadlines)

    def capture(self) -> str:
        return next(message.capture for _, message in self.told if isinstance(message, StartCapture))

    def orders(self, rank: RankName) -> list[str]:
        """Without the questions about clocks."""
        said = (message for name, message in self.told if name == rank)
        return [type(message).__name__ for message in said if not isinstance(message, TellClock)]


@pytest.mark.parametrize("name", ["encoder-0.1.trace.json", "gateway-0.1.hops.json", "trace.json.gz"])
def test_no_recording_is_mixed_into_an_earlier_one(tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = studio.captures(tmp_path)
        (tmp_path / name).touch()
        with pytest.raises(UserError, match="holds a recording already") as refused:
            captures.start(StartCaptures(output=str(tmp_path)), [DECODE])
        assert "leave --output out" in (refused.value.hint or "")
        assert studio.told == []
        (tmp_path / name).rename(tmp_path / "notes.txt")
        captures.start(StartCaptures(output=str(tmp_path)), [DECODE])
        assert studio.orders(DECODE) == ["StartCapture"]

    asyncio.run(scenario())


def test_a_rank_that_never_answers_is_told_to_stop_and_then_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = studio.captures(tmp_path, Deadlines(record=0.01, write=0.01, clocks=0.01))
        captures.start(StartCaptures(steps=5), [DECODE])
        await studio.stopped.wait()
        assert studio.orders(DECODE) == ["StartCapture", "StopCapture"]
        reply = await captures.stop()
        assert [result.error for result in reply.results] == ["did not write its trace within 0.01 s"]
        assert (reply.merged, studio.merges) == (None, []), "there is nothing to merge"

    asyncio.run(scenario())


def test_what_another_incarnation_or_another_capture_wrote_does_not_count(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = studio.captures(tmp_path)
        captures.start(StartCaptures(steps=5), [ENCODER, DECODE])
        reply = asyncio.create_task(captures.stop())
        await asyncio.sleep(0)
        written = CaptureWritten(capture=studio.capture(), path="/trace")
        captures.hear(ENCODER, Incarnation(2), written)
        captures.died(ENCODER, Incarnation(2))
        captures.hear(ENCODER, FIRST, CaptureWritten(capture="another", path="/trace"))
        captures.hear(DECODE, FIRST, written)
        await asyncio.sleep(0)
        assert not reply.done()
        captures.died(ENCODER, FIRST)
        found = {result.rank: (result.path, result.error) for result in (await reply).results}
        assert found == {DECODE: ("/trace", None), ENCODER: (None, "died while it was recording")}

    asyncio.run(scenario())


def test_the_results_of_a_capture_that_ended_by_itself_are_told_once_at_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = studio.captures(tmp_path)
        captures.start(StartCaptures(), [DECODE])
        captures.hear(DECODE, FIRST, CaptureWritten(capture=studio.capture(), path="/trace"))
        (result,) = (await captures.stop()).results
        assert (result.path, result.note) == ("/trace", "its clock was not told, so its times are as it wrote them")

    asyncio.run(scenario())


def test_a_rank_without_a_model_records_until_those_that_count_are_done(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = studio.captures(tmp_path)
        captures.start(StartCaptures(steps=1), [DECODE, GATEWAY])
        planned = {rank: order for rank, order in studio.told if isinstance(order, StartCapture)}
        assert (planned[GATEWAY].path, planned[GATEWAY].steps) == (None, None)
        captures.hear(DECODE, FIRST, CaptureWritten(capture=studio.capture(), path="/t", hops="/d"))
        assert studio.orders(GATEWAY) == ["StartCapture", "StopCapture"]
        captures.hear(GATEWAY, FIRST, CaptureWritten(capture=studio.capture(), hops="/g"))
        reply = await captures.stop()
        assert reply.merged == str(tmp_path / reply.capture / "trace.json.gz")
        (order,) = studio.merges
        assert [(source.rank, source.trace, source.hops) for source in order.sources] == [
            (GATEWAY, None, "/g"),
            (DECODE, "/t", "/d"),
        ], "in the order of the pipeline"

    asyncio.run(scenario())


def test_a_share_that_cannot_be_merged_is_its_rank_s_error_and_nobody_else_s(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        studio.report = MergeReport(sources=[MergedSource(rank=DECODE, error="broken"), MergedSource(rank=ENCODER)])
        captures = studio.captures(tmp_path)
        captures.start(StartCaptures(), [DECODE, ENCODER])
        for rank in (DECODE, ENCODER):
            captures.hear(rank, FIRST, CaptureWritten(capture=studio.capture(), path="/t"))
        reply = await captures.stop()
        assert [(result.path, result.error) for result in reply.results] == [("/t", None), ("/t", "broken")]
        assert (reply.merged is not None, reply.merge_error) == (True, None)

    asyncio.run(scenario())


def test_each_rank_s_clock_is_asked_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    ahead = 5_000_000_000

    class Answering(Studio):
        asked: Captures

        def tell(self, rank: RankName, message: SupervisorToRank) -> None:
            super().tell(rank, message)
            if isinstance(message, TellClock):
                heard = message.asked + ahead
                answer = ClockTold(asked=message.asked, heard=heard, told=heard)
                asyncio.get_running_loop().call_soon(self.asked.hear, rank, FIRST, answer)

    async def scenario() -> None:
        studio = Answering()
        captures = studio.asked = studio.captures(tmp_path, Deadlines())
        captures.start(StartCaptures(), [DECODE])
        captures.hear(DECODE, FIRST, CaptureWritten(capture=studio.capture(), path="/t"))
        (result,) = (await captures.stop()).results
        assert result.clock_offset_us is not None
        assert result.clock_uncertainty_us is not None
        assert abs(result.clock_offset_us - ahead / 1000) <= result.clock_uncertainty_us + 0.01  # of rounding
        assert [source.offset_us for source in studio.merges[0].sources] == [result.clock_offset_us]
        started = [type(message) for _, message in studio.told].index(StartCapture)
        asked = [at for at, (_, message) in enumerate(studio.told) if isinstance(message, TellClock)]
        assert asked[0] < started < asked[-1]

    asyncio.run(scenario())
