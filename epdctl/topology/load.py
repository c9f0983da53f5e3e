"""A topology file, loaded: the passes one after the other, and every mistake of all of them in one error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from epdctl.errors import Mistake, TopologyError
from epdctl.topology.checks import Finding, check
from epdctl.topology.reading import parse, read_text
from epdctl.topology.schema import Topology
from epdctl.topology.validation import Validated, validate

__all__ = ["load", "loads"]


def load(path: Path, environ: Mapping[str, str]) -> Topology:
    """Raises TopologyError with every mistake in the file."""
    return loads(str(path), read_text(path), environ)


def loads(source: str, text: str, environ: Mapping[str, str]) -> Topology:
    """``source``: the file's name, for messages and for the cluster's default name."""
    parsed = parse(source, text, environ)  # masks references, composes, resolves; notes duplicate keys
    validated = validate(parsed)  # the schema: unknown keys, types, bounds, words
    checked = _checked(validated)  # what must hold between fields
    mistakes = [
        *parsed.mistakes,
        *validated.mistakes,
        *(validated.document.mistake(finding.trail, finding.problem, finding.remedy) for finding in checked),
    ]
    if mistakes or validated.file is None:
        raise TopologyError(sorted(mistakes, key=_position))
    name = validated.file.cluster or _default_name(source)
    return Topology(name, validated.file, parsed.document)


def _checked(validated: Validated) -> list[Finding]:
    """Findings, less those that rest on a value which was mended: they might not be there otherwise."""
    if validated.file is None:
        return []
    return [finding for finding in check(validated.file) if not finding.rests_on(validated.touched)]


def _position(mistake: Mistake) -> tuple[int, int]:
    _, line, column = mistake.place.rsplit(":", 2)
    return int(line), int(column)


def _default_name(source: str) -> str:
    """From the file's name; ``epdctl.yaml`` and what makes no name are ``default``."""
    stem = re.sub(r"[^a-z0-9_-]+", "-", Path(source).stem.lower()).strip("-_")[:32]
    return stem if stem and stem != "epdctl" else "default"
