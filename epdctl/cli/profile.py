"""``epdctl profile``: torch profiler recordings of every model rank at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epdctl.cli import options

if TYPE_CHECKING:
    from epdctl.wire.control import CaptureReply

app = typer.Typer(no_args_is_help=True, help="Record what every model rank does, as Chrome traces.")


@app.command()
def start(
    ctx: typer.Context,
    ranks: options.Ranks = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="End by itself after N steps.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the traces go.")] = None,
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Begin a recording. It ends at `epdctl profile stop`, or after N engine steps of each rank (encoder: batches)."""
    from epdctl.cli import console

    directory = None if output is None else str(output.absolute())
    reply = options.client(ctx, cluster).start_captures(ranks or [], steps=steps, output=directory)
    console.say("recording; `epdctl profile stop` ends it, waits for the files and names them")
    _show(reply, json=json)


@app.command()
def stop(ctx: typer.Context, json: options.Json = False, cluster: options.Cluster = None) -> None:
    """End the recording; prints one trace file per rank, or why there is none."""
    _show(options.client(ctx, cluster).stop_captures(), json=json)


def _show(reply: CaptureReply, *, json: bool) -> None:
    from epdctl.cli import console, tables

    if json:
        console.show_json(reply)
    else:
        console.show(tables.capture_table(reply))
    if any(result.error is not None for result in reply.results):
        raise typer.Exit(1)
