"""Files that a verb writes beside what it prints: looked at before its work, which may take minutes, and told after."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer

from epdctl.cli import console
from epdctl.errors import UserError

__all__ = ["picture", "why_not", "writable", "writing"]


def writable(param: typer.CallbackParam, file: Path | None) -> Path | None:
    """Of an option. Raises UserError where nothing could be written there."""
    if file is not None and (trouble := why_not(file)) is not None:
        raise UserError(f"{param.opts[0]} {file}: {trouble}")
    return file


def picture(param: typer.CallbackParam, file: Path | None) -> Path | None:
    """Of an option whose file will be a PNG, and must be called one."""
    if file is not None and not file.name.lower().endswith(".png"):
        raise UserError(f"{param.opts[0]} {file}: it will be a PNG, so its name should end in .png")
    return writable(param, file)


def why_not(file: Path) -> str | None:
    """Why ``file`` cannot be written; None when nothing is known against it. Opens nothing: a pipe would wait."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return _why_not_in(Path(os.path.realpath(file)).parent)  # a link may point to a file that is yet to be
    except OSError as error:
        return error.strerror
    if stat.S_ISDIR(mode):
        return "is a directory"
    return None if os.access(file, os.W_OK) else "not writable"


def _why_not_in(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"no such directory: {folder}"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"not writable: {folder}"


@contextmanager
def writing(option: str, file: Path) -> Generator[None]:
    """Says that ``file`` was written. Raises UserError when it could not be after all, as on a disk that is full."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {file}: {error.strerror or error}") from error
    console.say(f"wrote {file}")
