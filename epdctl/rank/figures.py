"""Every rank's figures, asked of the supervisor, who has them from heartbeats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from epdctl.errors import DeadlineExceeded
from epdctl.wire.lifecycle import AskFigures, Figures, RankFigures

__all__ = ["Enquiry"]

SECONDS = 2.0


class Enquiry:
    """``post`` sends the question. Whoever asks while one is out shares its answer."""

    def __init__(self, post: Callable[[AskFigures], None]) -> None:
        self._post = post
        self._answer: asyncio.Future[Sequence[RankFigures]] | None = None

    async def ask(self) -> Sequence[RankFigures]:
        """Raises DeadlineExceeded when the supervisor does not answer."""
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            self._post(AskFigures())
        asked = self._answer
        try:
            async with asyncio.timeout(SECONDS):
                return await asyncio.shield(asked)
        except TimeoutError as error:
            if self._answer is asked:
                self._answer = None  # the next one asks anew
            raise DeadlineExceeded(f"the supervisor did not answer within {SECONDS:g} s") from error

    def told(self, message: Figures) -> None:
        """The answer; one that comes too late is for nobody."""
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(message.ranks)
