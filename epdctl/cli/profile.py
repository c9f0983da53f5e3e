"""``epdctl profile``: what every rank does, recorded at once, and one trace of it all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epdctl.cli import options
from epdctl.cli.help import Verb, VerbGroup

if TYPE_CHECKING:
    from epdctl.wire.control import CaptureReply

app = typer.Typer(cls=VerbGroup, no_args_is_help=True, help="Record what every rank does, as one Chrome trace.")


@app.command(cls=Verb)
def start(
    ctx: typer.Context,
    ranks: options.Ranks = None,
    steps: Annotated[int | None, typer.Option(metavar="N", min=1, help="End by itself after N steps.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the traces go.")] = None,
    json: options.Json = False,
    cluster: options.Cluster = None,
) -> None:
    """Begin a recording. It ends at `epdctl profile stop`, or after N engine steps of each rank (encoder: batches)."""
    from epdctl.cli import console, tables

    directory = None if output is None else str(output.absolute())
    reply = options.client(ctx, cluster).start_captures(ranks or [], steps=steps, output=directory)
    if json:
        console.show_json(reply)
    else:
        for line in tables.capture_began(reply):
            console.data(line)
    if any(result.error is None for result in reply.results):
        console.say("`epdctl profile stop` ends it, waits for the files and names them")
    _fail_if_any_did(reply)


@app.command(cls=Verb)
def stop(ctx: typer.Context, json: options.Json = False, cluster: options.Cluster = None) -> None:
    """End the recording; prints the merged trace and one file per rank, or why there is none."""
    from epdctl.cli import console

    reply = options.client(ctx, cluster).stop_captures()
    if reply.arrows_backwards:
        console.say(f"{reply.arrows_backwards} of {reply.arrows} arrows point back in time: a clock was set meanwhile")
    _show(reply, json=json)


def _show(reply: CaptureReply, *, json: bool) -> None:
    from epdctl.cli import console, tables

    if json:
        console.show_json(reply)
    else:
        console.show(tables.capture_table(reply))
    _fail_if_any_did(reply)


def _fail_if_any_did(reply: CaptureReply) -> None:
    if reply.merge_error is not None or any(result.error is not None for result in reply.results):
        raise typer.Exit(1)
