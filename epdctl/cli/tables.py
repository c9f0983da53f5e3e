"""Reply structs as tables and lines. Pure: nothing here prints, asks or waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date, datetime
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from epdctl.cli.console import plain
from epdctl.ids import RankName, Stage
from epdctl.wire.control import CaptureReply, CaptureResult, Event, HealthReply, RankState, RankStatus, StatusReply

__all__ = [
    "capture_began",
    "capture_table",
    "changes",
    "draining_line",
    "duration",
    "encoder_address",
    "event_line",
    "health_lines",
    "remarks",
    "size",
    "status_line",
    "status_table",
    "status_title",
    "status_view",
    "turns",
]

STATE_STYLES = {
    RankState.READY: "green",
    RankState.WAITING: "cyan",
    RankState.STARTING: "cyan",
    RankState.UNHEALTHY: "yellow",
    RankState.BACKOFF: "yellow",
    RankState.DRAINING: "yellow",
    RankState.STOPPING: "yellow",
    RankState.STOPPED: "dim",
    RankState.FAILED: "bold red",
}
_SPANS = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))
_TAIL_LINES = 10


def duration(seconds: float) -> str:
    """The two largest units: ``4s``, ``3m20s``, ``2d5h``."""
    left = int(seconds)
    parts = []
    for span, unit in _SPANS:
        if left >= span:
            parts.append(f"{left // span}{unit}")
            left %= span
    return "".join(parts[:2]) or "0s"


def size(count: int | None) -> str:
    """Bytes in at most five characters: ``512B``, ``95M``, ``1.5G``."""
    if count is None:
        return "-"
    value = float(count)
    for unit in "BKMGT":
        if value < 1000 or unit == "T":
            break
        value /= 1024
    return f"{value:.1f}{unit}" if value < 10 and unit in "GT" else f"{value:.0f}{unit}"


def status_title(reply: StatusReply) -> str:
    ready = sum(status.state is RankState.READY for status in reply.ranks)
    encoder = encoder_address(reply)
    others = f", encoder {encoder}" if encoder is not None else ""
    return f"{reply.cluster}: {ready} of {len(reply.ranks)} ranks ready, gateway {reply.gateway or '(none)'}{others}"


def encoder_address(reply: StatusReply) -> str | None:
    """Where the encoder's own HTTP surface is, if it has one."""
    routers = (status for status in reply.ranks if status.stage is Stage.ENCODER_ROUTER)
    return next((status.endpoints.http for status in routers if status.endpoints.http), None)


def draining_line(reply: StatusReply, seconds: float) -> str:
    """What a stop waits for: the gateway's requests, and without a gateway what the ranks have."""
    at_gateway = [status for status in reply.ranks if status.stage is Stage.GATEWAY]
    count = sum(status.inflight or 0 for status in at_gateway or reply.ranks)
    return f"draining: {count} request{'' if count == 1 else 's'} in flight, at most {seconds:g} s"


def status_table(reply: StatusReply) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("RANK", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    table.add_column("REASON")  # the one column that gives way: Rich narrows what may wrap, and its cells may not
    for header in ("SINCE", "PID", "GPU", "RSS", "INFLIGHT", "RESTARTS"):
        table.add_column(header, no_wrap=True, justify="right")
    for status in reply.ranks:
        table.add_row(
            str(status.rank),
            Text(status.state, style=STATE_STYLES[status.state]),
            Text(_beyond(status.state, _one_line(status.reason)) or "-", no_wrap=True, overflow="ellipsis"),
            duration(status.since),
            _or_dash(status.pid),
            ",".join(str(gpu.index) for gpu in status.gpus) or "-",
            size(status.rss_bytes),
            _or_dash(status.inflight),
            _restarts(status),
        )
    return table


def status_view(reply: StatusReply) -> Group:
    """Title, table and remarks as one thing, for a place that is redrawn."""
    return Group(status_title(reply), status_table(reply), *remarks(reply))


def remarks(reply: StatusReply) -> list[str]:
    """What a table has no room for: how bytes move; why each rank that is not ready is not, and its last words."""
    lines = _transports(reply)
    for status in reply.ranks:
        if status.state is RankState.READY:
            continue
        again = "" if status.next_try_s is None else f"; next try in {status.next_try_s:.1f} s"
        lines.append(f"{status.rank} {_with_reason(status.state, plain(status.reason))}{again}")
        lines += tail_lines(status)
        if status.state is RankState.FAILED:
            lines.append(f"  {_anew(status.rank)}")
    return lines


def _transports(reply: StatusReply) -> list[str]:
    """Each way that bytes move, and where there are several, whose it is."""
    users: dict[str, list[str]] = {}
    for status in reply.ranks:
        if status.transfer:
            users.setdefault(plain(status.transfer), []).append(status.rank)
    return [f"transfer: {how}" + (f" ({', '.join(users[how])})" if len(users) > 1 else "") for how in sorted(users)]


def tail_lines(status: RankStatus, limit: int = _TAIL_LINES) -> list[str]:
    return [f"  | {plain(line)}" for line in status.log_tail[-limit:]]


def health_lines(reply: HealthReply) -> list[str]:
    """The verdict, then one line a problem."""
    deep = "" if reply.deep_seconds is None else f" (a real request took {reply.deep_seconds:.2f} s)"
    lines = [reply.verdict + deep]
    for problem in reply.problems:
        lines.append(f"  {problem.rank or 'cluster'}: {plain(problem.text)}")
        if problem.rank is not None and problem.text.startswith(f"{RankState.FAILED}: "):
            lines.append(f"    {_anew(problem.rank)}")
    return lines


def _anew(rank: RankName) -> str:
    return f"`epdctl restart {rank}` starts it anew"


def capture_began(reply: CaptureReply) -> list[str]:
    """Who records and where to; then who does not, and why."""
    recording = [result for result in reply.results if result.error is None]
    files = (result.hops or result.path for result in recording)
    folder = next((str(Path(file).parent) for file in files if file is not None), None)
    into = f" into {plain(folder)}" if folder is not None else ""
    skipped = [f"{result.rank} does not: {plain(result.error)}" for result in reply.results if result.error is not None]
    return [f"recording {len(recording)} rank{'' if len(recording) == 1 else 's'}{into}", *skipped]


def capture_table(reply: CaptureReply) -> Table:
    """A row a rank, and one for the trace they were merged into. CLOCK: its offset from the supervisor's."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for header in ("RANK", "CLOCK", "RESULT"):
        table.add_column(header, no_wrap=header != "RESULT", overflow="fold")
    for result in reply.results:
        failed = result.error is not None
        text = f"failed: {plain(result.error or '')}" if failed else _what_it_made(result)
        table.add_row(str(result.rank), _clock(result), Text(text, style="red" if failed else ""))
    if reply.merge_error is not None:
        table.add_row("merged", "", Text(f"failed: {plain(reply.merge_error)}", style="red"))
    elif reply.merged is not None:
        table.add_row("merged", "", Text(plain(reply.merged)))
    return table


def _what_it_made(result: CaptureResult) -> str:
    """Its trace; where it has none, why, or what it noted of requests."""
    if result.path is None:
        return plain(result.note or result.hops or "started")
    return plain(result.path if result.note is None else f"{result.path} ({result.note})")


def _clock(result: CaptureResult) -> str:
    if result.clock_offset_us is None or result.clock_uncertainty_us is None:
        return "-"
    return f"{result.clock_offset_us:+.0f} ± {result.clock_uncertainty_us:.0f} µs"


def event_line(event: Event, today: date | None = None) -> str:
    """``12:00:01.250 encoder/0#2 ready: …``; an event of the cluster itself names no rank. With its date when it is
    not of ``today``."""
    when = datetime.fromtimestamp(event.wall)
    dated = "%Y-%m-%d " if today is not None and when.date() != today else ""
    clock = when.strftime(f"{dated}%H:%M:%S.%f")[:-3]
    who = f"{event.rank}#{event.incarnation or 0}" if event.rank else "cluster"
    if event.kind == "exit":  # its text is a sentence: "killed by SIGKILL"
        return f"{clock} {who} {_one_line(event.text)}"
    what = event.state or event.kind
    return f"{clock} {who} {_with_reason(what, _one_line(event.text))}"


def changes(before: StatusReply | None, after: StatusReply) -> Iterator[str]:
    """One line for each rank whose state or reason is not what it was."""
    known = {status.rank: (status.state, status.reason) for status in before.ranks} if before else {}
    for status in after.ranks:
        if known.get(status.rank) != (status.state, status.reason):
            yield status_line(status)


def status_line(status: RankStatus) -> str:
    return f"{status.rank} {_with_reason(status.state, _one_line(status.reason))}"


def turns(replies: Iterable[StatusReply]) -> Iterator[StatusReply]:
    """Those that show a state or a reason which the one before did not."""
    before = None
    for reply in replies:
        if before is None or any(changes(before, reply)):
            yield reply
        before = reply


def _with_reason(state: str, reason: str) -> str:
    text = _beyond(state, reason)
    return f"{state}: {text}" if text else state


def _beyond(state: str, reason: str) -> str:
    """What ``reason`` says that ``state`` does not: of ``ready; last restart: …`` its second half."""
    return "" if reason == state else reason.removeprefix(f"{state}; ")


def _restarts(status: RankStatus) -> str:
    """``2``, or ``2+1`` where somebody asked for one more."""
    return f"{status.restarts}+{status.restarts_asked}" if status.restarts_asked else str(status.restarts)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _one_line(text: str) -> str:
    return " ".join(plain(text).split())
