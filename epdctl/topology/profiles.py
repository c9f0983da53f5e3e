"""The ready topologies that come with epdctl: in the wheel, or beside the package in a checkout."""

from __future__ import annotations

import importlib.resources
from importlib.resources.abc import Traversable
from pathlib import Path

from epdctl.errors import UserError
from epdctl.topology.words import closest

__all__ = ["list_profiles", "profile_text"]


def list_profiles() -> list[str]:
    """Names, sorted: "1gpu", …, "cpu-demo"."""
    return sorted(Path(file.name).stem for file in _folder().iterdir() if file.name.endswith(".yaml"))


def profile_text(name: str) -> str:
    """Raises UserError when there is no such profile."""
    names = list_profiles()
    if name not in names:
        near = closest(name, names)
        hint = (f"did you mean {near}? " if near else "") + f"there are: {', '.join(names)}"
        raise UserError(f"no profile is called {name!r}", hint=hint)
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _folder() -> Traversable:
    package = importlib.resources.files("epdctl")
    shipped = package / "_profiles"
    return shipped if shipped.is_dir() else Path(str(package)).parent / "profiles"
