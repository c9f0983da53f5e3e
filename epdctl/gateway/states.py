"""The life of one request, as the gateway sees it: a literal table. Pure.

HANDOFF is the time between the first token, which prefill sampled, and the second, which is the decode rank's own; a
language rank has no handoff. Lost work goes back to RECEIVED and is placed again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

__all__ = ["ENDED", "TABLE", "IllegalStep", "RequestState", "Step", "advance"]


class RequestState(enum.StrEnum):
    RECEIVED = "received"  # bounded and tokenised; no rank works on it
    ENCODING = "encoding"  # slots are asked for, media are on their way
    PREFILLING = "prefilling"  # every embedding has landed, or there is none
    HANDOFF = "handoff"
    DECODING = "decoding"
    FINISHED = "finished"
    ABORTED = "aborted"  # the client hung up
    FAILED = "failed"


class Step(enum.StrEnum):
    PLACED_MEDIA = "placed-media"
    PLACED_TEXT = "placed-text"
    EMBEDDED = "embedded"
    HANDED = "handed"  # the first token of a prefill and decode pair
    TOKEN = "token"
    LOST = "lost"
    FINISH = "finish"
    ABORT = "abort"
    FAIL = "fail"


class IllegalStep(RuntimeError):
    """A step that the table does not know: a defect of the gateway, never of a client."""


S, E = RequestState, Step

ENDED = frozenset({S.FINISHED, S.ABORTED, S.FAILED})

_ANYWHERE = {E.ABORT: S.ABORTED, E.FAIL: S.FAILED, E.FINISH: S.FINISHED}
_ANSWERING = {**_ANYWHERE, E.HANDED: S.HANDOFF, E.TOKEN: S.DECODING, E.LOST: S.RECEIVED}

# The first token may overtake the router's word that the last item is encoded: they come over two sockets.
# FINISH in RECEIVED: everything asked for had arrived when the rank was lost.
TABLE: Mapping[RequestState, Mapping[Step, RequestState]] = {
    S.RECEIVED: {**_ANYWHERE, E.PLACED_MEDIA: S.ENCODING, E.PLACED_TEXT: S.PREFILLING},
    S.ENCODING: {**_ANSWERING, E.EMBEDDED: S.PREFILLING},
    S.PREFILLING: _ANSWERING,
    S.HANDOFF: {**_ANYWHERE, E.TOKEN: S.DECODING, E.LOST: S.RECEIVED},
    S.DECODING: {**_ANYWHERE, E.TOKEN: S.DECODING, E.LOST: S.RECEIVED},
    S.FINISHED: {},
    S.ABORTED: {},
    S.FAILED: {},
}


def advance(state: RequestState, step: Step) -> RequestState:
    """Raises IllegalStep, and then nothing has changed."""
    try:
        return TABLE[state][step]
    except KeyError:
        raise IllegalStep(f"a request that is {state} cannot take the step {step}") from None
