"""``epdctl restart``: drain ranks and start them again."""

from __future__ import annotations

from typing import Annotated

import typer

from epdctl.cli import options


def restart(
    ctx: typer.Context,
    ranks: Annotated[
        list[str],
        typer.Argument(metavar="RANK", autocompletion=options.complete_ranks, help="encoder/0, a stage, or all."),
    ],
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Drain ranks and start them anew, all at once; the others serve on. A failed rank gets a new budget."""
    from epdctl.cli import console

    accepted = options.client(ctx, cluster).restart(ranks)
    if json:
        console.show_json(accepted)
    else:
        for rank in accepted.ranks:
            console.data(rank)
    console.say("restarting; `epdctl status -w` shows it")
