"""``epdctl logs``: what the ranks wrote, of this run or, when nothing runs, of the last."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from epdctl.cli import options


def logs(
    ctx: typer.Context,
    ranks: options.Logs = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they write; Ctrl-C ends.")] = False,
    tail: Annotated[int, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the last N of each rank.")] = 100,
    previous: Annotated[bool, typer.Option("--previous", help="Of the process before the present one.")] = False,
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Print what ranks wrote, each line with its rank's name; `daemon`: their supervisor. Of the last run when nothing
    runs."""
    from epdctl.cli import console, kept
    from epdctl.cli.loglines import LogPrinter, log_lines
    from epdctl.wire.control import FollowLogs

    wanted = FollowLogs(ranks=ranks or [], tail=tail, follow=follow, previous=previous)
    printer = LogPrinter(sys.stdout)
    run = kept.the_run(options.chosen_cluster(ctx, cluster), os.environ)
    lines = log_lines(run, wanted)
    if run.epitaph:
        console.say(run.epitaph)
    for line in lines:
        if json:
            console.show_json(line)
        else:
            printer.print(line)
