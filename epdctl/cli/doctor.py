"""``epdctl doctor``: is this machine fit, and is anything left of dead runs?"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from epdctl.cli import options


def doctor(
    sweep: Annotated[bool, typer.Option("--sweep", help="Also remove what is left of runs whose daemon died.")] = False,
    json: options.Json = False,
) -> None:
    """Check this machine, and what dead runs left on it.

    Python, libraries, GPUs, kernel, limits, directories, leftovers: each finding with its remedy.

    Exit 1 when something must be mended before a cluster can run.
    """
    from epdctl.cli import console
    from epdctl.cli.checks import Level
    from epdctl.cli.examine import examine
    from epdctl.cli.sweeping import check_leftovers

    found = [*examine(os.environ), check_leftovers(os.environ, sweep=sweep)]
    if json:
        console.show_json(found)
    else:
        for check in found:
            console.data(f"{check.level:<5} {check.subject:<13} {check.finding}")
            if check.remedy:
                console.data(f"{'':<19} {check.remedy}")
    if any(check.level is Level.FAIL for check in found):
        raise typer.Exit(1)
