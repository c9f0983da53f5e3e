"""``epdctl restart``: drain ranks and start them again."""

from __future__ import annotations

from typing import Annotated

import typer

from epdctl.cli import options


def restart(
    ctx: typer.Context,
    ranks: Annotated[
        list[str],
        typer.Argument(metavar="RANK…", autocompletion=options.complete_ranks, help="encoder/0, a stage, or all."),
    ],
    cluster: options.Cluster = None,
) -> None:
    """Drain ranks and start them anew; the others serve on. A failed rank gets a new budget."""
    from epdctl.cli import console

    for rank in options.client(ctx, cluster).restart(ranks).ranks:
        console.data(rank)
    console.say("restarting; `epdctl status -w` shows it")
