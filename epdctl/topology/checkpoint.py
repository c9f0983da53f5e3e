"""Finds the checkpoint that ``model`` names and reads what the plan needs of it, without torch or transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from epdctl.errors import Mistake, TopologyError
from epdctl.families import SERVED
from epdctl.topology.largest import Bounds, Largest, largest
from epdctl.topology.schema import Topology
from epdctl.topology.weights import Weights, read_weights
from epdctl.topology.words import closest

__all__ = ["BUNDLED", "UNKNOWN", "Checkpoint", "find_checkpoint"]

BUNDLED = ("shapes-vl",)  # shipped in the package's data
_NAME_ONE = f"name a checkpoint's directory, a hub id, or {BUNDLED[0]}, the small model that is shipped"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    directory: Path
    name: str  # the hub id, or the directory's own name
    family: str
    dtype: str | None  # what the weights are stored as, when config.json says so
    weights: Weights | None = None  # where its files say how large they are
    largest: Largest | None = None  # what a request may show to it


UNKNOWN = Checkpoint(Path("unknown"), "unknown", "unknown", None)  # in place of one that could not be found


def find_checkpoint(topology: Topology, environ: Mapping[str, str]) -> Checkpoint:
    """Raises TopologyError, placed at ``model.path``, when it is not there or not served."""
    directory, name = _directory(topology, environ)
    config = _config(topology, directory)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in SERVED:
        near = closest(model_type, SERVED) if isinstance(model_type, str) else None
        served = f"served are: {', '.join(SERVED)}" + (f"; did you mean {near!r}?" if near else "")
        raise _wrong(topology, f"model_type {model_type!r} of {directory} is not served", served)
    limits = topology.file.limits
    bounds = Bounds(limits.max_pixels, limits.max_clip_seconds)
    weights, shown = read_weights(directory), largest(directory, bounds)
    return Checkpoint(directory, name, model_type, _dtype(config), weights, shown)


def _directory(topology: Topology, environ: Mapping[str, str]) -> tuple[Path, str]:
    path = topology.file.model.path
    local = Path(environ.get("HOME", "~"), path[2:]) if path.startswith("~/") else Path(path)
    if local.is_dir():
        return local.resolve(), local.resolve().name
    if path in BUNDLED:
        return Path(str(resources.files("epdctl").joinpath("data", path))), path
    if _HUB_ID.match(path):
        return _cached(topology, environ), path
    if local.exists():
        raise _wrong(topology, f"{local.resolve()} is a file", "name the checkpoint's directory")
    raise _wrong(topology, f"there is no directory {local.resolve()}", _NAME_ONE)


def _cached(topology: Topology, environ: Mapping[str, str]) -> Path:
    """The snapshot of a hub id in the local cache; nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    model = topology.file.model
    fetch = f"hf download {model.path}" + (f" --revision {model.revision}" if model.revision else "")
    cache = _cache(environ)
    try:
        found = snapshot_download(model.path, revision=model.revision, cache_dir=cache, local_files_only=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        problem = f"{model.path!r} is neither a directory here nor in the hub's cache {cache}"
        raise _wrong(topology, problem, f"fetch it: {fetch}") from None
    except HFValidationError as error:
        raise _wrong(topology, f"not a hub id: {error}", "write owner/name, or a directory") from error
    return Path(found)


def _cache(environ: Mapping[str, str]) -> Path:
    """Where the hub's own tools keep what they fetched, by their own variables."""
    if environ.get("HF_HUB_CACHE"):
        return Path(environ["HF_HUB_CACHE"])
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"], "hub")
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/"), ".cache")
    return Path(cache, "huggingface", "hub")


def _config(topology: Topology, directory: Path) -> Mapping[str, object]:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        remedy = "name the directory that holds config.json, the weights and the tokenizer"
        raise _wrong(topology, f"{directory} holds no config.json", remedy) from None
    except OSError as error:
        raise _wrong(topology, f"{file} cannot be read: {error.strerror}", "check its permissions") from error
    except ValueError as error:
        raise _wrong(topology, f"{file} is not JSON: {error}", "fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise _wrong(topology, f"{file} holds no JSON object", "fetch the checkpoint again")
    return config


def _dtype(config: Mapping[str, object]) -> str | None:
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    for source, key in ((config, "dtype"), (config, "torch_dtype"), (inner, "dtype"), (inner, "torch_dtype")):
        if source.get(key) in ("float32", "bfloat16", "float16"):
            return str(source[key])
    return None


def _wrong(topology: Topology, problem: str, remedy: str) -> TopologyError:
    mistake: Mistake = topology.document.mistake(("model", "path"), problem, remedy)
    return TopologyError([mistake])
