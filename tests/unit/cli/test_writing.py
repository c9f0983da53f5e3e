"""The files that ``bench`` verbs write: refused before anything is measured, written after everything was printed."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from epdctl.bench.transfer import Row
from epdctl.cli import bench
from epdctl.cli.writing import why_not
from tests.unit.cli.conftest import Run

MEASURES = {
    "supervisor": "epdctl.bench.supervisor.measure",
    "encode": "epdctl.bench.encoding.measure.measure",
    "dispatch": "epdctl.bench.dispatching.measure.measure",
    "transfer": "epdctl.bench.transfer.run",
}
ROW = Row(transport="zmq", bytes=4096, p50_us=1.0, gb_per_s=4.1, ceiling_gb_per_s=9.0, register_us=1.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs that came to their measurement; that of ``transfer`` finds one row."""
    begun: list[str] = []

    def measure(verb: str, *_: object) -> list[Row]:
        begun.append(verb)
        return [ROW]

    for verb, function in MEASURES.items():
        monkeypatch.setattr(function, partial(measure, verb))
    return begun


@pytest.mark.parametrize("words", [*(f"{verb} --output" for verb in MEASURES), "transfer --plot"])
def test_a_place_that_cannot_be_written_is_told_before_the_measurement(
    run: Run, measured: list[str], tmp_path: Path, words: str
) -> None:
    place = tmp_path / "none" / "out.png"
    result = run("bench", *words.split(), str(place))
    assert (result.exit_code, result.stdout, measured) == (2, "", [])
    assert result.stderr == f"error: {words.split()[1]} {place}: no such directory: {place.parent}\n"


def test_what_stands_against_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, link, far = tmp_path / "there", tmp_path / "link", tmp_path / "far"
    there.touch()
    link.symlink_to("new")
    far.symlink_to("none/new")
    assert [why_not(file) for file in (there, tmp_path / "new", link, Path("/dev/null"))] == [None] * 4
    assert why_not(tmp_path) == "is a directory"
    assert why_not(far) == f"no such directory: {tmp_path.resolve() / 'none'}"
    assert why_not(there / "below") == "Not a directory"
    assert why_not(tmp_path / ("x" * 300)) == "File name too long"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write whatever its mode says
    assert why_not(there) == "not writable"
    assert why_not(tmp_path / "new") == f"not writable: {tmp_path.resolve()}"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["plot.svg", "plot"])
def test_a_picture_is_called_one(run: Run, measured: list[str], tmp_path: Path, name: str) -> None:
    result = run("bench", "transfer", "--plot", str(tmp_path / name))
    assert (result.exit_code, measured) == (2, [])
    assert result.stderr == f"error: --plot {tmp_path / name}: it will be a PNG, so its name should end in .png\n"


def test_both_files_are_told(run: Run, measured: list[str], tmp_path: Path) -> None:
    output, plot = tmp_path / "rows.json", tmp_path / "plot.PNG"
    result = run("bench", "transfer", "--output", str(output), "--plot", str(plot))
    assert (result.exit_code, result.stderr, measured) == (0, f"wrote {output}\nwrote {plot}\n", ["transfer"])
    assert '"transport":"zmq"' in output.read_text()
    with Image.open(plot) as drawn:
        assert drawn.format == "PNG"


def test_what_could_not_be_written_after_all_costs_neither_the_table_nor_the_picture(
    run: Run, measured: list[str], tmp_path: Path
) -> None:
    plot = tmp_path / "plot.png"
    result = run("bench", "transfer", "--output", "/dev/full", "--plot", str(plot))
    assert (result.exit_code, measured) == (2, ["transfer"])
    assert "\nzmq " in result.stdout
    assert result.stderr == f"wrote {plot}\nerror: --output /dev/full: No space left on device\n"


def test_a_reader_that_left_costs_no_file(tmp_path: Path) -> None:
    def show(_: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        bench._deliver([ROW], show, tmp_path / "rows.json", json=False)
    assert (tmp_path / "rows.json").exists()
