"""The proof after ``down``: it sees what is there, and only then does its silence mean something."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from epdctl.cli.leftovers import Footprint, await_nothing, find_leftovers
from epdctl.cli.sweeping import clear, dead_runs
from epdctl.ids import RunId, new_run_id

WAITS = "import sys; print('up', flush=True); sys.stdin.read()"


@contextlib.contextmanager
def process_of(run: RunId):  # type: ignore[no-untyped-def]
    """A process that carries the run's id, in a session of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        env=os.environ | {"EPDCTL_RUN": run}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        try:
            yield process
        finally:
            process.kill()


def test_processes_directory_and_port_are_seen(tmp_path: Path) -> None:
    run = new_run_id()
    with process_of(run) as process, socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        found = find_leftovers(Footprint(run, tmp_path, url))
    assert found[0].startswith(f"process {process.pid} (")
    assert found[1:] == [f"run directory {tmp_path}", f"something that listens at {url}"]
    assert find_leftovers(Footprint(run, tmp_path / "none", url)) == []


def test_it_looks_until_nothing_is_left_or_patience_ends() -> None:
    looks = [["a"], ["a"], []]
    footprint = Footprint(RunId("r"), Path("/none"), None)
    assert await_nothing(footprint, clock=lambda: 0.0, pause=lambda _: None, look=lambda _: looks.pop(0)) == []
    times = iter((0.0, 1.0, 100.0))
    assert await_nothing(footprint, clock=lambda: next(times), pause=lambda _: None, look=lambda _: ["b"]) == ["b"]


def test_a_dead_run_is_found_by_its_directory_and_removed_with_its_processes(tmp_path: Path) -> None:
    run = new_run_id()
    directory = tmp_path / "demo"
    directory.mkdir()
    (directory / "lock").write_text(f'{{"pid":4194303,"start_time":1,"run":"{run}"}}')
    environ = {"EPDCTL_RUNTIME_DIR": str(tmp_path)}
    with process_of(run) as process:
        (dead,) = dead_runs(environ)
        assert [ref.pid for ref in dead.processes] == [process.pid]
        assert dead_runs(environ, "other") == []
        assert clear(dead) == []
        assert process.wait(60) == -9
    assert not directory.exists()
    assert clear(dead) == []
