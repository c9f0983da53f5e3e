"""``epdctl health``: one word, its reasons, and an exit status that scripts can use."""

from __future__ import annotations

from typing import Annotated

import typer

from epdctl.cli import options

UNHEALTHY = 1


def health(
    ctx: typer.Context,
    deep: Annotated[bool, typer.Option("--deep", help="Also send a real request through every stage.")] = False,
    timeout: Annotated[float, typer.Option(metavar="S", min=0.1, help="How long to wait for the verdict.")] = 30.0,
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Say whether it serves, and why not. Exit 0 when healthy; 1 when degraded or unhealthy; 3 when nothing runs."""
    from epdctl.cli import console, tables

    reply = options.client(ctx, cluster).health(deep=deep, budget_s=timeout)
    if json:
        console.show_json(reply)
    else:
        for line in tables.health_lines(reply):
            console.data(line)
    if reply.verdict != "healthy":
        raise typer.Exit(UNHEALTHY)
