"""``epdctl bench``: measurements with figures, not impressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from epdctl.cli import options
from epdctl.cli.help import Verb, VerbGroup
from epdctl.cli.writing import picture, writable, writing

if TYPE_CHECKING:
    from epdctl.bench.dispatching import measure as dispatching
    from epdctl.bench.encoding import measure as encoding
    from epdctl.bench.supervisor import Report
    from epdctl.bench.transfer import Row

R = TypeVar("R")
Output = Annotated[Path | None, typer.Option(metavar="FILE", callback=writable, help="Also write the JSON there.")]
app = typer.Typer(cls=VerbGroup, no_args_is_help=True, help="Measure what epdctl itself costs on this machine.")


@app.command(cls=Verb)
def supervisor(
    kills: Annotated[int, typer.Option(metavar="N", min=1, help="How often to kill a rank, and the daemon.")] = 20,
    output: Output = None,
    json: options.Json = False,
) -> None:
    """Time to notice a death, to be ready again, to leave nothing, and of `epdctl --help`.

    Starts a cluster of its own with idle ranks; touches no other.
    """
    from epdctl.bench.supervisor import measure
    from epdctl.cli import console

    report = measure(kills, console.say)
    _deliver(report, _show, output, json=json)


@app.command(cls=Verb)
def encode(
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the towers: 7b or tiny; default: 7b, with --cpu tiny.")
    ] = None,
    encoders: Annotated[int, typer.Option(metavar="N", min=1, help="Encoder ranks, each with its own GPU.")] = 1,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.5, help="Of steady state with clients.")] = 30.0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Without GPUs: shows that it works, not how fast.")] = False,
    flows_only: Annotated[bool, typer.Option("--flows-only", help="Only ranks, not the tower alone.")] = False,
    output: Output = None,
    json: options.Json = False,
) -> None:
    """How fast pictures become embeddings: the tower alone, and ranks fed with JPEGs by 64 clients.

    Random weights, pictures of noise, every one new. Starts a cluster of its own; touches no other.
    """
    from epdctl.bench.encoding.measure import Job, measure, tower_size
    from epdctl.cli import console

    wanted = tower_size(size, gpu=not cpu)
    job = Job(size=wanted, gpu=not cpu, encoders=encoders, seconds=seconds, towers=not flows_only)
    report = measure(job, console.say)
    _deliver(report, _show_encoding, output, json=json)


@app.command(cls=Verb)
def dispatch(
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Of both, in turns.")] = 5,
    items: Annotated[int, typer.Option(metavar="N", min=1, help="One at a time, in each round.")] = 400,
    output: Output = None,
    json: options.Json = False,
) -> None:
    """What the encoder router costs an item, against plain sockets with as many hops.

    One frame of 100 KiB to a rank that only answers, and back. Starts a cluster of its own; touches no other.
    """
    from epdctl.bench.dispatching.measure import measure
    from epdctl.cli import console

    report = measure(rounds, items, console.say)
    _deliver(report, _show_dispatching, output, json=json)


def _deliver(report: R, show: Callable[[R], None], output: Path | None, *, json: bool) -> None:
    """To stdout, for a machine or for a person, and to the file that was named, even when nobody reads stdout."""
    from epdctl.cli import console
    from epdctl.wire.message import to_json

    try:
        if json:
            console.show_json(report)
        else:
            show(report)
    finally:
        if output is not None:
            with writing("--output", output):
                output.write_bytes(to_json(report) + b"\n")


def _show_dispatching(report: dispatching.Report) -> None:
    from epdctl.cli import console

    console.data(f"{'':<14} {'baseline':>10} {'epdctl':>10} {'ratio':>7}")
    console.data(f"{'p50, µs':<14} {report.base_p50_us:>10.1f} {report.p50_us:>10.1f} {report.ratio_p50:>7.2f}")
    console.data(f"{'64 under way':<14} {report.base_rate:>8.0f}/s {report.rate:>8.0f}/s {report.ratio_rate:>7.2f}")


def _show_encoding(report: encoding.Report) -> None:
    from epdctl.cli import console

    console.data(f"{report.device}, {report.encoders} encoder ranks of {report.workers} preprocessing threads")
    for tower in report.towers:
        name = f"{tower.tower}, {tower.pictures} of {tower.side}²"
        console.data(f"{name:<28} {tower.transformers_ms:>9.1f} ms by transformers {tower.fast_ms:>9.1f} ms ours")
        errors = f"{tower.transformers_error:.4f} and {tower.fast_error:.4f}"
        console.data(f"{'':<28} {errors:>18} off float32")
    for one in report.packed:
        name = f"one forward, {one.pictures} of {one.side}²"
        console.data(f"{name:<28} {one.ms:>9.1f} ms {one.rate:>9.1f} pictures/s")
    for flow in report.flows:
        console.data(
            f"{flow.name:<28} {flow.per_second:>9.1f} pictures/s, p50 {flow.p50_ms:.0f} ms, p99 {flow.p99_ms:.0f} ms"
        )
    for name, ratio in (("with decoding", report.packed_ratio), ("without", report.undecoded_ratio)):
        if ratio is not None:
            console.data(f"of one packed forward, {name}: {ratio:.1%}")


def _show(report: Report) -> None:
    from epdctl.cli import console

    console.data(f"{'':<10} {'p50':>10} {'max':>10}   over {report.kills} kills, {report.ranks} ranks")
    for name in ("detect_ms", "ready_ms", "gone_ms", "cli_ms"):
        figures = getattr(report, name)
        console.data(f"{name:<10} {figures.p50:>10.1f} {figures.max:>10.1f}")


@app.command(cls=Verb)
def transfer(
    transports: Annotated[
        list[str] | None, typer.Argument(metavar="TRANSPORT", help="Only these; default: all that work here.")
    ] = None,
    largest: Annotated[str, typer.Option(metavar="SIZE", help="Up to this size, like 64MiB.")] = "1GiB",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=picture, help="Also draw bandwidth over size, as a PNG.")
    ] = None,
    output: Output = None,
    json: options.Json = False,
) -> None:
    """Bytes between two processes: latency and bandwidth of every transport beside a plain copy of the same run.

    With two GPUs also between them, each process seeing only its own; there the sizes of an embedding (74 MB) and of
    a KV cache (596 MB) are measured too.
    """
    import os

    from epdctl.bench.transfer import run
    from epdctl.cli import console

    rows = run(transports or [], largest, os.environ, console.say)
    try:
        _deliver(rows, _show_transfer, output, json=json)
    finally:
        if plot is not None:
            _draw(rows, plot)


def _draw(rows: Sequence[Row], plot: Path) -> None:
    from epdctl.bench.plot import draw

    with writing("--plot", plot):
        draw(_lines(rows), "epdctl bench transfer: until the receiver may read", plot)


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row.transport, []).append((row.bytes, row.gb_per_s))
        lines.setdefault("copy, GPU to GPU" if row.transport.startswith("gpu") else "copy in memory", []).append(
            (row.bytes, row.ceiling_gb_per_s)
        )
    return lines


def _show_transfer(rows: Sequence[Row]) -> None:
    from epdctl.cli import console

    head = ("bytes", "p50 us", "GB/s", "copy GB/s", "register us", "moving GB/s", "summed us")
    console.data(f"{'transport':<26} " + " ".join(f"{name:>11}" for name in head))
    for row in rows:
        summed = "-" if row.summed_us is None else f"{row.summed_us:.1f}"
        moving = "-" if row.moving_gb_per_s is None else f"{row.moving_gb_per_s:.2f}"
        console.data(
            f"{row.transport:<26} {row.bytes:>11} {row.p50_us:>11.1f} {row.gb_per_s:>11.2f} "
            f"{row.ceiling_gb_per_s:>11.2f} {row.register_us:>11.1f} {moving:>11} {summed:>11}"
        )
