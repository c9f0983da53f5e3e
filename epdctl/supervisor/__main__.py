"""The daemon's process: reads what to run from standard input, says on standard output whether it stands, and serves.

Started by ``epdctl up``; standard error is the daemon's log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from epdctl import log
from epdctl.control.handover import HANDOVER, OUTCOME, Handover, Outcome, Started
from epdctl.control.paths import RunState
from epdctl.control.server import refusal
from epdctl.errors import EpdError
from epdctl.supervisor.rundir import claim, prune
from epdctl.supervisor.service import serve, sweep_former

__all__ = ["main"]

OUR_FAULT = 70


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    log.setup()
    os.umask(0o077)
    try:
        _run(HANDOVER.decode(_input()), options.lifeline)
    except EpdError as error:
        logging.getLogger(__name__).error("%s", error.message)
        _answer(refusal(error))
        return error.exit_status
    except Exception:
        logging.getLogger(__name__).exception("the daemon failed")
        return OUR_FAULT
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="epdctl-daemon", description=__doc__)
    parser.add_argument("--cluster", help="shown in the process table; the plan says the name")
    parser.add_argument("--lifeline", type=int, help="a file descriptor whose end is the daemon's")
    return parser.parse_args(argv)


def _run(handover: Handover, lifeline: int | None) -> None:
    plan, state = handover.plan, RunState(Path(handover.state_dir))
    rundir = claim(state, plan.cluster, os.environ, sweep_former, [rank.rank for rank in plan.ranks])
    prune(plan.cluster, os.environ)
    asyncio.run(serve(plan, rundir, lifeline, lambda: _answer(Started())))


def _input() -> bytes:
    """Everything on standard input, which from then on is empty for our children too."""
    data = sys.stdin.buffer.read()
    _to_null(0)
    return data


def _answer(outcome: Outcome) -> None:
    """Say it once and close: the starter waits for the end. One that is gone by now is no reason to stop."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, OUTCOME.encode(outcome))
    _to_null(1)


def _to_null(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
