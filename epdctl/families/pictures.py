"""What the families have in common without torch: their token ids, their end tokens, and pictures in the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epdctl.errors import LoadError
from epdctl.families.base import Picture, Prompt
from epdctl.families.files import read_json, read_json_if_there
from epdctl.wire.serve import PromptItem

__all__ = ["PictureFamily", "refuse_empty"]

_IMAGE_TOKEN = ("image_token_id", "image_token_index")  # the new name and the old


class PictureFamily(ABC):
    """Implements families.base.Family for models with one placeholder token: heirs say how many a picture takes."""

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / "config.json")
        self.image_token = _image_token(config, directory)
        self._end = _end_tokens(read_json_if_there(directory / "generation_config.json"), config)
        if not self._end:
            raise LoadError(f"{directory} names no eos_token_id, neither in generation_config.json nor in config.json")

    @property
    def end_token_ids(self) -> Sequence[int]:
        return self._end

    @abstractmethod
    def picture_tokens(self, width: int, height: int, of: int) -> Picture: ...

    def expand(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> Prompt:
        found = sum(token == self.image_token for token in tokens)
        if found != len(pictures):
            raise ValueError(f"the prompt has {found} places for pictures, and there are {len(pictures)} pictures")
        prompt = Prompt([], [])
        for token in tokens:
            if token == self.image_token:
                self._place(prompt, pictures[len(prompt.items)])
            else:
                prompt.tokens.append(token)
        return prompt

    def _place(self, prompt: Prompt, picture: Picture) -> None:
        item = PromptItem(
            index=len(prompt.items),
            modality="image",
            grid=list(picture.grid),
            offset=len(prompt.tokens),
            rows=picture.rows,
        )
        prompt.items.append(item)
        prompt.tokens.extend([self.image_token] * picture.rows)


def refuse_empty(width: int, height: int) -> None:
    """Raises ValueError for a picture without pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels is empty")


def _image_token(config: Mapping[str, Any], directory: Path) -> int:
    found = [config[name] for name in _IMAGE_TOKEN if name in config]
    if not found or not isinstance(found[0], int):
        raise LoadError(f"{directory}/config.json: image_token_id is {found[0] if found else None!r}, not a token id")
    return found[0]


def _end_tokens(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """The first of the places where a checkpoint may name them that does."""
    for source in (generation, config, config.get("text_config") or {}):
        named = source.get("eos_token_id")
        if named is not None:
            return list(named) if isinstance(named, list) else [named]
    return []
