"""One question for all who ask at once, and an end for those who are not answered."""

from __future__ import annotations

import asyncio

import pytest

from epdctl.errors import DeadlineExceeded
from epdctl.ids import RankName, Stage
from epdctl.rank import figures
from epdctl.rank.figures import Enquiry
from epdctl.wire.lifecycle import AskFigures, Figures, RankFigures


class Supervisor:
    """Notes each question."""

    def __init__(self) -> None:
        self.asked: list[AskFigures] = []
        self._news = asyncio.Event()

    def ask(self, question: AskFigures) -> None:
        self.asked.append(question)
        self._news.set()

    async def hears(self) -> None:
        await self._news.wait()
        self._news.clear()


ONE = RankFigures(rank=RankName("decode/0"), stage=Stage.DECODE, ready=True, restarts=0)


def test_those_who_ask_together_share_one_answer() -> None:
    async def scene() -> None:
        supervisor = Supervisor()
        enquiry = Enquiry(supervisor.ask)
        both = [asyncio.create_task(enquiry.ask()) for _ in range(2)]
        await supervisor.hears()
        enquiry.told(Figures(ranks=[ONE]))
        assert [list(await each) for each in both] == [[ONE], [ONE]]
        assert len(supervisor.asked) == 1
        enquiry.told(Figures(ranks=[]))  # for nobody
        later = asyncio.create_task(enquiry.ask())
        await supervisor.hears()
        enquiry.told(Figures(ranks=[]))
        assert list(await later) == []

    asyncio.run(scene())


def test_one_who_leaves_does_not_take_the_answer_along() -> None:
    async def scene() -> None:
        supervisor = Supervisor()
        enquiry = Enquiry(supervisor.ask)
        leaves, stays = (asyncio.create_task(enquiry.ask()) for _ in range(2))
        await supervisor.hears()
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        enquiry.told(Figures(ranks=[ONE]))
        assert list(await stays) == [ONE]

    asyncio.run(scene())


def test_silence_has_a_deadline_and_is_asked_about_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SECONDS", 0.01)

    async def scene() -> None:
        supervisor = Supervisor()
        enquiry = Enquiry(supervisor.ask)
        for _ in range(2):
            with pytest.raises(DeadlineExceeded, match="did not answer"):
                await enquiry.ask()
        assert len(supervisor.asked) == 2

    asyncio.run(scene())
