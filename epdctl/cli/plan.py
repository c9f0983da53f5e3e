"""``epdctl plan``: exactly what ``up`` would run. Starts nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from epdctl.cli import options


def plan(
    ctx: typer.Context,
    file: options.File = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="The cluster's name.")] = None,
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Print exactly what `up` would run. Each rank's command, environment, GPUs, threads and ports; starts nothing."""
    from epdctl.cli import console, plans

    made = options.make_plan(ctx, file, name or cluster)
    if json:
        console.show_json(made)
        return
    for line in plans.plan_lines(made):
        console.data(line)
    for note in made.notes:
        console.say(f"note: {note}")
