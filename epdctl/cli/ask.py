"""``epdctl ask``: one question from the shell, its answer streamed to the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epdctl.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from epdctl.cli.asking import Said


def ask(
    ctx: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask; - reads it from stdin.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE", help="Pictures or videos to look at, or sound clips to hear, before the question."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", min=1, help="The longest answer.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0, max=2, help="0: the likeliest words.")
    ] = 0.0,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told beforehand.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", min=1, help="Seconds between two words.")] = 300.0,
    json: Annotated[bool, typer.Option("--json", help="Print the gateway's whole answer as one line of JSON.")] = False,
    cluster: options.Cluster = None,
) -> None:
    """Ask the running cluster one question, about pictures, videos or sound if any is named. Exit 1 when it is refused.

    A gateway with a key takes it from EPDCTL_API_KEY.
    """
    from epdctl.cli import asking, console

    text = sys.stdin.read() if question == "-" else question
    parts = [*(asking.medium(path) for path in files or ()), asking.words(text)]
    said = [{"role": "system", "content": system}] if system else []
    body = {"messages": [*said, {"role": "user", "content": parts}], "temperature": temperature}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    gateway = asking.Gateway(_address(ctx, cluster), os.environ.get("EPDCTL_API_KEY"), timeout)
    with asking.by_name(files or ()):
        if json:
            console.data(gateway.whole(body))
        else:
            _show(gateway.pieces(body))


def _show(pieces: Iterable[Said]) -> None:
    """The answer as it comes; then what a person may miss about it."""
    from epdctl.cli import console

    silent, reason = True, None
    for piece in pieces:
        sys.stdout.write(console.plain(piece.text))
        sys.stdout.flush()
        silent = silent and not piece.text
        reason = piece.reason or reason
    console.data("")
    if silent:
        console.say(f"note: the model answered nothing (finish_reason: {reason})")
    elif reason == "length":
        console.say("note: the answer was cut; --max-tokens N lets it be longer")


def _address(ctx: typer.Context, cluster: str | None) -> str:
    from epdctl.errors import NotRunning

    reply = options.client(ctx, cluster).status()
    if reply.gateway is None:
        raise NotRunning(f"{reply.cluster} has no gateway to ask", hint="`epdctl status` shows what runs")
    return reply.gateway
