"""A topology file, loaded: the passes one after the other, and every mistake of all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from epdctl.errors import Mistake
from epdctl.topology.checks import Finding, check
from epdctl.topology.document import Trail
from epdctl.topology.reading import parse, read_text
from epdctl.topology.schema import Topology
from epdctl.topology.validation import Validated, validate

__all__ = ["Draft", "draft", "draft_of"]


@dataclass(frozen=True, slots=True)
class Draft:
    """A file with its mistakes. ``topology``: as it may be once they are mended; None where that cannot be told."""

    topology: Topology | None
    mistakes: tuple[Mistake, ...]


def draft(path: Path, environ: Mapping[str, str]) -> Draft:
    """Raises TopologyError when the file is no YAML mapping."""
    return draft_of(str(path), read_text(path), environ)


def draft_of(source: str, text: str, environ: Mapping[str, str]) -> Draft:
    """``source``: the file's name, for messages and for the cluster's default name."""
    parsed = parse(source, text, environ)  # masks references, composes, resolves; notes duplicate keys
    validated = validate(parsed)  # the schema: unknown keys, types, bounds, words
    checked = _checked(validated)  # what must hold between fields
    mistakes = (
        *parsed.mistakes,
        *validated.mistakes,
        *(validated.document.mistake(finding.trail, finding.problem, finding.remedy) for finding in checked),
    )
    if validated.file is None:
        return Draft(None, mistakes)
    name = validated.file.cluster or _default_name(source)
    return Draft(Topology(name, validated.file, parsed.document, _doubtful(validated, checked)), mistakes)


def _checked(validated: Validated) -> list[Finding]:
    """Findings, less those that rest on a value which was mended: they might not be there otherwise."""
    if validated.file is None:
        return []
    return [finding for finding in check(validated.file) if not finding.rests_on(validated.touched)]


def _doubtful(validated: Validated, findings: list[Finding]) -> frozenset[Trail]:
    found = {trail for finding in findings for trail in (finding.trail, *finding.also)}
    return validated.touched | found


def _default_name(source: str) -> str:
    """From the file's name; ``epdctl.yaml`` and what makes no name are ``default``."""
    stem = re.sub(r"[^a-z0-9_-]+", "-", Path(source).stem.lower()).strip("-_")[:32]
    return stem if stem and stem != "epdctl" else "default"
