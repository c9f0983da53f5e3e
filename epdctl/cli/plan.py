"""``epdctl plan``: exactly what ``up`` would run. Starts nothing."""

from __future__ import annotations

import typer

from epdctl.cli import options


def plan(
    ctx: typer.Context,
    file: options.File = None,
    name: options.Name = None,
    json: options.Json = False,
) -> None:
    """Print exactly what `up` would run. Each rank's command, environment, GPUs, threads and ports; starts nothing."""
    from epdctl.cli import console, plans

    made = options.make_plan(ctx, file, name)
    if json:
        console.show_json(made)
        return
    for line in plans.plan_lines(made):
        console.data(line)
    for note in made.notes:
        console.say(f"note: {note}")
