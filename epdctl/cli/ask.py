"""``epdctl ask``: one question from the shell, its answer streamed to the terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from epdctl.cli import options


def ask(
    ctx: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask; - reads it from stdin.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="Pictures to look at, or sound clips to hear, before the question."),
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
    """Ask the running cluster one question, about pictures or sound clips if any are named. Exit 1 when it is refused.

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
    if json:
        console.data(gateway.whole(body))
        return
    cut = False
    for piece in gateway.pieces(body):
        sys.stdout.write(console.plain(piece.text))
        sys.stdout.flush()
        cut = cut or piece.cut
    console.data("")
    if cut:
        console.say("note: the answer was cut; --max-tokens N lets it be longer")


def _address(ctx: typer.Context, cluster: str | None) -> str:
    from epdctl.errors import NotRunning

    reply = options.client(ctx, cluster).status()
    if reply.gateway is None:
        raise NotRunning(f"{reply.cluster} has no gateway to ask", hint="`epdctl status` shows what runs")
    return reply.gateway
