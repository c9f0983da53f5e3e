"""``epdctl down``: take a cluster down without a trace."""

from __future__ import annotations

from typing import Annotated

import typer

from epdctl.cli import options


def down(
    ctx: typer.Context,
    timeout: Annotated[
        float | None, typer.Option("--timeout", "-t", metavar="S", min=0, help="How long requests may take to end.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Kill at once; requests in flight are lost.")] = False,
    cluster: options.Cluster = None,
) -> None:
    """Drain, stop and remove a cluster, then prove that nothing is left. Fine when nothing runs."""
    from epdctl.cli import raising

    raising.take_down(options.chosen_cluster(ctx, cluster), drain_s=timeout, force=force)
