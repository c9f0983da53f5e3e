"""The README keeps up with the code: its topology is valid, its verbs and files are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import epdctl
from tests.unit.cli.test_process import VERBS
from tests.unit.topology.support import load

PACKAGE = Path(epdctl.__file__).parent
README = (PACKAGE.parent / "README.md").read_text()


def test_the_topology_by_example_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    file = tmp_path / "shop.yaml"
    file.write_text(example)
    topology = load(file, {})
    assert (topology.cluster, topology.file.gateway.port) == ("shop", 8000)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_place(verb: str) -> None:
    assert re.search(rf"^### .*`{verb}\b", README, re.MULTILINE)


def test_every_file_of_the_reading_paths_is_there() -> None:
    section = README.split("## Reading the code")[1].split("\n## ")[0]
    folder = PACKAGE
    for name in re.findall(r"`([\w/]+\.py)`", section):
        file = PACKAGE / name if "/" in name else folder / name
        assert file.exists(), name
        folder = file.parent
