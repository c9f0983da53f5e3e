"""The command ``epdctl``: every verb, and the one place where an error becomes a message and an exit status."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer

from epdctl import __version__
from epdctl.cli import (
    ask,
    bench,
    doctor,
    down,
    events,
    health,
    init,
    logs,
    plan,
    profile,
    restart,
    schema,
    status,
    up,
    version,
)
from epdctl.cli.console import data, hush, say, show_error
from epdctl.cli.help import Verb, VerbGroup
from epdctl.cli.options import LOOK, MEASURE, RUN, WRITE, Globals, complete_clusters
from epdctl.errors import EpdError

__all__ = ["app", "main"]

INTERRUPTED = 130
NOBODY_READS = (errno.EPIPE, errno.EIO)  # a pipe whose reader left; a terminal that was closed
ELSEWHERE = {  # what other tools call it
    **dict.fromkeys(("ps", "ls", "list", "show", "describe"), "status"),
    "top": "status -w",
    **dict.fromkeys(("stop", "kill", "rm", "delete"), "down"),
    **dict.fromkeys(("start", "run", "serve"), "up"),
}


class Verbs(VerbGroup):
    """Runs the verb; whatever it raises leaves as a message on stderr and an exit status, never as a traceback."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{ELSEWHERE[args[0]]}'?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except EpdError as error:
            show_error(error)
            raise typer.Exit(error.exit_status) from error
        except OSError as error:
            if error.errno not in NOBODY_READS:
                raise
            hush(sys.stdout)
            raise typer.Exit(0) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error
        else:
            return result


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        data(f"epdctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="NAME",
            envvar="EPDCTL_CLUSTER",
            autocompletion=complete_clusters,
            help="Which cluster, when several run; may also follow the verb.",
        ),
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Multimodal language models as supervised encode, prefill and decode processes, from one YAML file.

    Data goes to stdout, everything else to stderr.

    Exit status: 0 fine, 1 unhealthy or failed, 2 usage or topology, 3 not running, 4 unreachable, 5 time-out, 70 our
    own fault.
    """
    ctx.obj = Globals(cluster=cluster)


for name, verb, panel in (
    ("up", up.up, RUN),
    ("down", down.down, RUN),
    ("restart", restart.restart, RUN),
    ("ask", ask.ask, LOOK),
    ("status", status.status, LOOK),
    ("health", health.health, LOOK),
    ("logs", logs.logs, LOOK),
    ("events", events.events, LOOK),
    ("init", init.init, WRITE),
    ("plan", plan.plan, WRITE),
    ("schema", schema.schema, WRITE),
    ("doctor", doctor.doctor, MEASURE),
    ("version", version.version, MEASURE),
):
    app.command(name, cls=Verb, rich_help_panel=panel)(verb)
app.add_typer(profile.app, name="profile", rich_help_panel=MEASURE)
app.add_typer(bench.app, name="bench", rich_help_panel=MEASURE)


def main() -> None:
    try:
        app(prog_name="epdctl")
    except Exception as error:
        if os.environ.get("EPDCTL_DEBUG"):
            raise
        say(f"error: something is wrong in epdctl itself: {type(error).__name__}: {error}")
        say(f"hint: the traceback is in {_kept_traceback()}; EPDCTL_DEBUG=1 prints it")
        sys.exit(EpdError.exit_status)


def _kept_traceback() -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="epdctl-", suffix=".traceback", delete=False) as file:
        traceback.print_exc(file=file)
    return file.name
