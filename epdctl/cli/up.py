"""``epdctl up``: make the cluster of a topology exist."""

from __future__ import annotations

from typing import Annotated

import typer

from epdctl.cli import options


def up(
    ctx: typer.Context,
    file: options.File = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when every rank is ready.")] = False,
    wait_timeout: Annotated[
        float | None, typer.Option("--wait-timeout", metavar="S", min=1, help="Give up, and take it down, after S s.")
    ] = None,
    name: options.Name = None,
) -> None:
    """Start every rank of a topology and wait until all are ready.

    In the foreground their logs follow; Ctrl-C or a closed terminal drains and stops the cluster, a second Ctrl-C
    kills it. With -d the cluster stays. When a rank fails, or the time is over, everything is taken down again and
    nothing stays behind: exit 1 with its reason and last lines, or 5.
    """
    from epdctl.cli import raising

    plan = options.make_plan(ctx, file, name)
    if detach:
        raising.detached(plan, wait_timeout)
    else:
        raising.foreground(plan, wait_timeout)
