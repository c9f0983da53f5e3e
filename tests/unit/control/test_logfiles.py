"""Finding log files and reading their ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epdctl.control import logfiles
from epdctl.control.logfiles import last_bytes, log_files, log_path, tail
from epdctl.ids import Incarnation, RankName


def test_files_are_found_by_rank_and_incarnation_and_others_left_alone(tmp_path: Path) -> None:
    ranks = [("encoder/0", 10), ("encoder/0", 9), ("encoder-router/0", 1), ("prefill/0.1", 2)]
    for rank, incarnation in ranks:
        log_path(tmp_path, RankName(rank), Incarnation(incarnation)).touch()
    for other in ("notes.txt", "stage-0.1.log", "encoder-0.log"):
        (tmp_path / other).touch()
    found = [(file.rank, file.incarnation) for file in log_files(tmp_path)]
    assert found == [("encoder-router/0", 1), ("encoder/0", 9), ("encoder/0", 10), ("prefill/0.1", 2)]
    assert log_files(tmp_path / "missing") == []


def test_the_tail_of_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "missing", 5) == []


@given(
    lines=st.lists(st.text(st.sampled_from("ab é"), max_size=9), max_size=12),
    wanted=st.integers(0, 15),
    block=st.integers(1, 40),
    ended=st.booleans(),
)
def test_the_tail_is_the_last_lines_whatever_the_size_of_a_block(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], wanted: int, block: int, ended: bool
) -> None:
    text = "\n".join(lines) + ("\n" if ended and lines else "")
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_bytes(text.encode())
    before, logfiles._BLOCK = logfiles._BLOCK, block
    try:
        expected = text.split("\n")[:-1] if text.endswith("\n") else text.split("\n") if text else []
        assert tail(path, wanted) == (expected[-wanted:] if wanted else [])
        data, end = last_bytes(path, wanted)
        assert end == len(text.encode())
        assert text.encode().endswith(data)
    finally:
        logfiles._BLOCK = before
