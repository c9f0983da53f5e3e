"""``epdctl schema``: the JSON Schema of a topology, for editors."""

from __future__ import annotations


def schema() -> None:
    """Print the JSON Schema of a topology, for editors."""
    import json

    from epdctl.cli import console
    from epdctl.topology.schema import json_schema

    console.data(json.dumps(json_schema(), indent=2))
