"""``epdctl status``: every rank, gateway and router included."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from epdctl.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from epdctl.wire.control import StatusReply


def status(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again on every change.")] = False,
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Show every rank: state, reason, process, GPUs, memory, work."""
    daemon = options.client(ctx, cluster)
    now = daemon.status()  # and one that hangs is not watched in silence
    if not watch:
        _show_one(now, json=json)
    elif json:
        _show_each(daemon.watch(), json=True)
    else:
        _show_live(daemon.watch())


def _show_one(reply: StatusReply, *, json: bool) -> None:
    from epdctl.cli import console, tables

    if json:
        console.show_json(reply)
        return
    console.data(tables.status_title(reply))
    console.show(tables.status_table(reply))
    for line in tables.remarks(reply):
        console.data(line)


def _show_each(replies: Iterable[StatusReply], *, json: bool) -> None:
    for reply in replies:
        _show_one(reply, json=json)


def _show_live(replies: Iterable[StatusReply]) -> None:
    """On a terminal the table stays in its place; elsewhere each change of a state is one more table."""
    from epdctl.cli import console, tables

    if not console.is_fancy(sys.stdout):
        _show_each(tables.turns(replies), json=False)
        return
    from rich.live import Live

    with Live(console=console.console(sys.stdout), auto_refresh=False) as live:
        for reply in replies:
            live.update(tables.status_view(reply), refresh=True)
