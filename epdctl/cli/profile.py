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
    """Begin a recording: until `epdctl profile stop`, or, waiting for them, N engine steps (encoder: batches)."""
    from epdctl.cli import console

    daemon = options.client(ctx, cluster)
    if steps is not None:
        console.say(f"recording {steps} steps of each rank; a rank without work waits for it")
    directory = None if output is None else str(output.absolute())
    _show(daemon.start_captures(ranks or [], steps=steps, output=directory), json=json)


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
