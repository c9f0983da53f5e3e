"""``python -m epdctl.rank``: one rank. Reads its RankSpec from standard input, whole, before any heavy import."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import NoReturn

from epdctl.errors import BadMessage
from epdctl.log import setup
from epdctl.rank.fatal import Departure
from epdctl.wire.config import RankSpec
from epdctl.wire.lifecycle import SPEC

__all__ = ["main"]

log = logging.getLogger("epdctl.rank")  # not "__main__"


def main() -> NoReturn:
    setup()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's to answer
    try:
        spec = SPEC.decode(sys.stdin.buffer.read())
    except BadMessage as error:
        log.error("no rank was described on standard input: %s", error)
        _leave(Departure.CONFIG)
    _leave(_live(spec))


def _live(spec: RankSpec) -> Departure:
    from epdctl.rank.process import run

    log.info("%s, incarnation %d, cluster %s", spec.rank, spec.incarnation, spec.cluster)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop.run_until_complete(run(spec))


def _leave(status: Departure) -> NoReturn:
    """End now: the interpreter's own way out would wait for threads that may be inside a forward."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
