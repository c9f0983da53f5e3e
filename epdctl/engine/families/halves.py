"""Loads one half of a checkpoint through transformers' own classes, and refuses anything that is not wholly there."""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from epdctl.errors import LoadError
from epdctl.wire.config import ModelConfig

__all__ = ["as_the_librarys_own", "load_half", "load_refusals", "torch_dtype"]

logger = logging.getLogger(__name__)

_SHOWN = 8  # parameter names in one message


def as_the_librarys_own(half: type[Any]) -> type[Any]:
    """Gives a half the module and name of the class it is half of. transformers finds the renaming of a checkpoint's
    keys by both; under another name it loads random weights, and a log line is all one sees of it.
    """
    whole = half.__mro__[1]
    half.__module__, half.__name__, half.__qualname__ = whole.__module__, whole.__name__, whole.__qualname__
    return half


def load_half(half: type[Any], model: ModelConfig, *, attention: str, other: Sequence[str]) -> Any:
    """``half``: the family's class with its other half taken out, dressed as_the_librarys_own. ``other``: what the
    other half's parameter names begin with, in old checkpoints and new. It is built on the meta device, so that the
    other half is never read. Raises LoadError.
    """
    directory = Path(model.path)
    if not (directory / "config.json").is_file():
        raise LoadError(f"{directory} has no config.json", hint="path must be a transformers checkpoint directory")
    with load_refusals(directory), _quiet():
        module, info = half.from_pretrained(
            directory,
            dtype=torch_dtype(model),
            attn_implementation=attention,
            ignore_mismatched_sizes=True,  # so that they are named below, all of them
            output_loading_info=True,
            local_files_only=True,
        )
    _refuse_gaps(directory, info)
    _mention_extras(directory, info, other)
    _read_in(module)
    return module.eval().requires_grad_(False)


def torch_dtype(model: ModelConfig) -> torch.dtype:
    dtype = getattr(torch, model.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LoadError(f"no number format {model.dtype!r}", hint="dtype: float32, bfloat16 or float16")
    return dtype


@contextlib.contextmanager
def load_refusals(directory: Path) -> Iterator[None]:
    """What transformers, safetensors and torch raise over a checkpoint, as one LoadError."""
    try:
        yield
    except MemoryError as error:
        raise LoadError(f"not enough memory to load {directory}", hint="a smaller model, or more memory") from error
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().partition("\n")[0]
        raise LoadError(f"{directory} cannot be loaded: {type(error).__name__}: {first}") from error


def _read_in(module: Any) -> None:
    """On a CPU the weights are a mapped file, and ranks of one host share its pages. Touch each page now: ready means
    that no request waits for the disk, and what a rank has loaded shows in its resident memory.
    """
    for parameter in module.parameters():
        per_page = mmap.PAGESIZE // parameter.element_size()
        parameter.detach().flatten()[::per_page].sum()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a table of the other half's parameters: what matters of it comes back as loading info, and is judged."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)


def _refuse_gaps(directory: Path, info: dict[str, Any]) -> None:
    """transformers fills a gap with random numbers and a log line; we do not start."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(f"{name} ({[*found]}, should be {[*due]})" for name, found, due in info["mismatched_keys"])
    if missing:
        raise LoadError(f"{directory} lacks {len(missing)} parameters: {_some(missing)}")
    if mismatched:
        raise LoadError(f"{directory} has {len(mismatched)} parameters of the wrong shape: {_some(mismatched)}")


def _mention_extras(directory: Path, info: dict[str, Any], other: Sequence[str]) -> None:
    extras = sorted(key for key in info["unexpected_keys"] if not key.startswith(tuple(other)))
    if extras:
        logger.warning("%s has %d parameters that nobody reads: %s", directory, len(extras), _some(extras))


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
