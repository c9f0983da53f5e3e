"""``epdctl events``: the daemon's own record of what happened, oldest first; of the last run when nothing runs."""

from __future__ import annotations

import os
from datetime import date
from typing import Annotated

import typer

from epdctl.cli import options


def events(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they happen; Ctrl-C ends.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Only the last N.")] = None,
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Print what happened: starts, deaths, states, commands. Of the last run when nothing runs."""
    from epdctl.cli import console, kept, tables

    run = kept.the_run(options.chosen_cluster(ctx, cluster), os.environ)
    found = kept.events(run, follow=follow, tail=tail)
    if run.epitaph:
        console.say(run.epitaph)
    today = date.today()
    for event in found:
        if json:
            console.show_json(event)
        else:
            console.data(tables.event_line(event, today))
