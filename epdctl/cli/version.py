"""``epdctl version``: of epdctl and of everything whose version changes numbers."""

from __future__ import annotations

from epdctl.cli import options


def version(json: options.Json = False) -> None:
    """Print the versions of all that changes numbers."""
    from epdctl.cli import console
    from epdctl.cli.machine import versions

    found = versions()
    if json:
        console.show_json(found)
        return
    for name, value in found.items():
        console.data(f"{name:<13} {value or '(not there)'}")
