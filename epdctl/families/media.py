"""What the families have in common without torch: their token ids, their end tokens, and media in the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from epdctl.errors import LoadError
from epdctl.families.base import Header, PictureHeader, Prompt, Span
from epdctl.families.files import read_json, read_json_if_there
from epdctl.ids import Modality
from epdctl.wire.serve import PromptItem

__all__ = ["MediaFamily", "PictureFamily", "refuse_empty"]


class MediaFamily(ABC):
    """Implements families.base.Family for models with one placeholder token per modality: heirs say which, and how many
    of it a medium takes."""

    placeholders: ClassVar[Mapping[Modality, Sequence[str]]]  # names in config.json: the new one and older ones

    def __init__(self, directory: Path) -> None:
        config = read_json(directory / "config.json")
        self.tokens = dict(self._named(config, directory))
        self._end = _end_tokens(read_json_if_there(directory / "generation_config.json"), config)
        if not self._end:
            raise LoadError(f"{directory} names no eos_token_id, neither in generation_config.json nor in config.json")

    @property
    def modalities(self) -> Sequence[Modality]:
        return tuple(each for each in self.tokens if self.obstacle(each) is None)

    def obstacle(self, modality: Modality) -> str | None:
        return None

    def _named(self, config: Mapping[str, Any], directory: Path) -> Iterator[tuple[Modality, int]]:
        """A checkpoint may leave out all but the first: what it has no token for it does not take."""
        for number, (modality, names) in enumerate(self.placeholders.items()):
            if number == 0 or any(name in config for name in names):
                yield modality, _token(config, names, directory)

    @property
    def end_token_ids(self) -> Sequence[int]:
        return self._end

    @abstractmethod
    def span(self, header: Header, of: int) -> Span: ...

    def expand(self, tokens: Sequence[int], spans: Sequence[Span]) -> Prompt:
        waiting = {token: _of(modality, spans) for modality, token in self.tokens.items()}
        self._check_count(tokens, spans)
        prompt = Prompt([], [], [])
        for token in tokens:
            if token in waiting:
                source = next(waiting[token])
                self._place(prompt, token, spans[source])
                prompt.sources.append(source)
            else:
                prompt.tokens.append(token)
        return prompt

    def _check_count(self, tokens: Sequence[int], spans: Sequence[Span]) -> None:
        for modality, token in self.tokens.items():
            places, given = sum(each == token for each in tokens), sum(span.modality == modality for span in spans)
            if places != given:
                nouns = f"{modality.noun}s"
                raise ValueError(f"the prompt has {places} places for {nouns}, and there are {given} {nouns}")

    def _place(self, prompt: Prompt, token: int, span: Span) -> None:
        item = PromptItem(
            index=len(prompt.items),
            modality=span.modality,
            grid=list(span.grid),
            offset=len(prompt.tokens),
            rows=span.rows,
            seconds=span.seconds,
        )
        prompt.items.append(item)
        prompt.tokens.extend([token] * span.rows)


class PictureFamily(MediaFamily):
    """For models that take pictures alone."""

    placeholders = {Modality.IMAGE: ("image_token_id", "image_token_index")}  # noqa: RUF012  (a class variable above)

    def span(self, header: Header, of: int) -> Span:
        if not isinstance(header, PictureHeader):
            raise ValueError(f"this model takes no {header.modality.noun}s")
        return self.picture_tokens(header.width, header.height, of)

    @abstractmethod
    def picture_tokens(self, width: int, height: int, of: int) -> Span: ...


def refuse_empty(width: int, height: int) -> None:
    """Raises ValueError for a picture without pixels."""
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels is empty")


def _of(modality: Modality, spans: Sequence[Span]) -> Iterator[int]:
    return (index for index, span in enumerate(spans) if span.modality == modality)


def _token(config: Mapping[str, Any], names: Sequence[str], directory: Path) -> int:
    found = next((config[name] for name in names if name in config), None)
    if not isinstance(found, int):
        raise LoadError(f"{directory}/config.json: {names[0]} is {found!r}, not a token id")
    return found


def _end_tokens(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """The first of the places where a checkpoint may name them that does."""
    for source in (generation, config, config.get("text_config") or {}):
        named = source.get("eos_token_id")
        if named is not None:
            return list(named) if isinstance(named, list) else [named]
    return []
