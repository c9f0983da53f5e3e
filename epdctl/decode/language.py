"""The language rank: prompt and answer on one engine and one KV pool, without a handoff."""

from __future__ import annotations

from typing import assert_never

from epdctl.engine.api import Advance
from epdctl.rank.machine import NATIVE, Parts
from epdctl.rank.prompts import PromptRank, PromptStay, fault
from epdctl.wire.config import RankSpec
from epdctl.wire.encode import EmbeddingLanded
from epdctl.wire.serve import TO_LANGUAGE, Abort, Generate, ToLanguage
from epdctl.wire.sockets import Sender
from epdctl.wire.trace import Kind

__all__ = ["LanguageService"]


class LanguageService(PromptRank[PromptStay, ToLanguage]):
    """Generate → Granted → EmbeddingLanded… → Token…, Finished."""

    kind = Kind.GENERATE

    def __init__(self, spec: RankSpec, parts: Parts = NATIVE) -> None:
        super().__init__(spec, TO_LANGUAGE, parts)

    def _received(self, sender: Sender, message: ToLanguage, _: list[memoryview]) -> None:
        match message:
            case Generate():
                self._generate(sender, message)
            case EmbeddingLanded():
                self._landed(message)
            case Abort():
                self._abort(message)
            case _:
                assert_never(message)

    def _generate(self, sender: Sender, message: Generate) -> None:
        answer = message.sampling.max_tokens
        stay = PromptStay(
            request=message.request,
            attempt=message.attempt,
            epoch=message.epoch,
            sender=sender,
            need=self._need(message, answer),
            prompt_tokens=len(message.tokens),
            ends_at=self._loop.time() + message.budget_s,
            tokens=message.tokens,
            items=message.items,
            sampling=message.sampling,
            answer_tokens=answer,
            missing={item.index for item in message.items},
        )
        if not self._enter(stay):
            return
        if (refusal := fault(message)) is not None:
            self._end(stay, refusal)
        else:
            self._queue(stay)

    def _advanced(self, stay: PromptStay, advance: Advance, made: object | None) -> None:
        if advance.prompt_done:
            self._prompt_done(stay)
        if advance.token is not None:
            self._answer(stay, advance.token, advance.finished, advance.likelihood)
