"""Captures against deadlines, with ranks that are only names."""

from __future__ import annotations

import asyncio
from pathlib import Path

from epdctl.ids import Incarnation, RankName
from epdctl.supervisor.captures import Captures, Deadlines
from epdctl.wire.control import StartCaptures
from epdctl.wire.lifecycle import CaptureWritten, StartCapture, StopCapture, SupervisorToRank

ENCODER, DECODE = RankName("encoder/0"), RankName("decode/0")
FIRST = Incarnation(1)


class Studio:
    """Everyone is connected; what they are told is kept."""

    def __init__(self) -> None:
        self.told: list[tuple[RankName, SupervisorToRank]] = []
        self.stopped = asyncio.Event()

    def connected(self, rank: RankName) -> Incarnation | None:
        return FIRST

    def tell(self, rank: RankName, message: SupervisorToRank) -> None:
        self.told.append((rank, message))
        if isinstance(message, StopCapture):
            self.stopped.set()

    def note(self, text: str) -> None:
        pass

    def capture(self) -> str:
        return next(message.capture for _, message in self.told if isinstance(message, StartCapture))


def test_a_rank_that_never_answers_is_told_to_stop_and_then_given_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = Captures(studio, tmp_path, Deadlines(record=0.01, write=0.01))
        captures.start(StartCaptures(steps=5), [DECODE])
        await studio.stopped.wait()
        assert [type(message) for _, message in studio.told] == [StartCapture, StopCapture]
        reply = await captures.stop()
        assert [result.error for result in reply.results] == ["did not write its trace within 0.01 s"]

    asyncio.run(scenario())


def test_what_another_incarnation_or_another_capture_wrote_does_not_count(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = Captures(studio, tmp_path)
        captures.start(StartCaptures(steps=5), [ENCODER, DECODE])
        reply = asyncio.create_task(captures.stop())
        await asyncio.sleep(0)
        written = CaptureWritten(capture=studio.capture(), path="/trace")
        captures.written(ENCODER, Incarnation(2), written)
        captures.died(ENCODER, Incarnation(2))
        captures.written(ENCODER, FIRST, CaptureWritten(capture="another", path="/trace"))
        captures.written(DECODE, FIRST, written)
        await asyncio.sleep(0)
        assert not reply.done()
        captures.died(ENCODER, FIRST)
        found = {result.rank: (result.path, result.error) for result in (await reply).results}
        assert found == {DECODE: ("/trace", None), ENCODER: (None, "died while it was recording")}

    asyncio.run(scenario())


def test_the_results_of_a_capture_that_ended_by_itself_are_told_once_at_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        studio = Studio()
        captures = Captures(studio, tmp_path)
        captures.start(StartCaptures(), [DECODE])
        captures.written(DECODE, FIRST, CaptureWritten(capture=studio.capture(), path="/trace"))
        assert [result.path for result in (await captures.stop()).results] == ["/trace"]

    asyncio.run(scenario())
