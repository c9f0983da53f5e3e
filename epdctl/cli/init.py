"""``epdctl init``: a commented topology to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epdctl.cli import options


def init(
    profile: Annotated[
        str, typer.Argument(metavar="PROFILE", autocompletion=options.complete_profiles, help="Which one to copy.")
    ] = "cpu-demo",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")] = Path(
        "epdctl.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Name the profiles and write nothing.")] = False,
) -> None:
    """Write a commented topology made from one of the shipped profiles."""
    from epdctl.cli import console
    from epdctl.topology.profiles import list_profiles, profile_text

    if list_:
        for name in list_profiles():
            console.data(name)
        return
    text = profile_text(profile)
    _write(output, text, force=force)
    console.say(f"wrote {output} from the profile {profile}; look it over, then: epdctl up {output}")


def _write(path: Path, text: str, *, force: bool) -> None:
    from epdctl.errors import UserError

    try:
        with path.open("w" if force else "x") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(
            f"{path} is there already", hint="--force overwrites it, --output FILE writes another"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
