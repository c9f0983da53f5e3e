"""``epdctl bench``: measurements with figures, not impressions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from epdctl.cli import options

if TYPE_CHECKING:
    from epdctl.bench.supervisor import Report

app = typer.Typer(no_args_is_help=True, help="Measure.")


@app.callback()
def bench() -> None:
    """Measure epdctl itself."""


@app.command()
def supervisor(
    kills: Annotated[int, typer.Option(metavar="N", min=1, help="How often to kill a rank, and the daemon.")] = 20,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON there.")] = None,
    json: options.Json = False,
) -> None:
    """Time to notice a death, to be ready again, to leave nothing, and of `epdctl --help`.

    Starts a cluster of its own with idle ranks; touches no other.
    """
    from epdctl.bench.supervisor import measure
    from epdctl.cli import console
    from epdctl.wire.message import to_json

    report = measure(kills, console.say)
    if output is not None:
        output.write_bytes(to_json(report) + b"\n")
    if json:
        console.show_json(report)
    else:
        _show(report)


def _show(report: Report) -> None:
    from epdctl.cli import console

    console.data(f"{'':<10} {'p50':>10} {'max':>10}   over {report.kills} kills, {report.ranks} ranks")
    for name in ("detect_ms", "ready_ms", "gone_ms", "cli_ms"):
        figures = getattr(report, name)
        console.data(f"{name:<10} {figures.p50:>10.1f} {figures.max:>10.1f}")
