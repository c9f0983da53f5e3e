"""What ``--help`` looks like: plain text, as wide as it needs to be, without Python's names for types.

What Rich would add costs as much time as everything else that ``--help`` does.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["Verb", "VerbGroup"]

SHORT_HELP = 120  # columns


class VerbGroup(TyperGroup):
    """Verbs in sections, each by the first sentence of its help. (Typer has its own copy of click: no public names.)"""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            verb: Any = self.get_command(ctx, name)
            title = verb.rich_help_panel if isinstance(verb.rich_help_panel, str) else "Verbs"
            sections.setdefault(title, []).append((name, verb.get_short_help_str(SHORT_HELP)))
        for title, verbs in sections.items():
            with formatter.section(title):
                formatter.write_dl(verbs)


class Verb(TyperCommand):
    """Its arguments by name alone, then its options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            if (row := param.get_help_record(ctx)) is not None:
                is_argument = param.param_type_name == "argument"
                name = row[0].partition(" <")[0] if is_argument else row[0]
                rows["Arguments" if is_argument else "Options"].append((name, row[1]))
        for title, found in rows.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)
