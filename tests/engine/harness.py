"""A question in all its forms: for the reference, for the tower, for the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from epdctl.engine.api import Advance, LanguageModel, NewSequence, StepInput, Tower
from epdctl.engine.core import Engine
from epdctl.engine.kv import KvPool
from epdctl.engine.pages import PageAllocator, pages_for
from epdctl.families import open_family
from epdctl.rank.headers import read_header
from epdctl.wire.config import EngineConfig, Limits
from epdctl.wire.encode import MediaItem
from epdctl.wire.serve import FinishReason, PromptItem, Sampling
from tests.support.reference import Reference, Tied, as_part, picture_bytes, reference_generate

__all__ = ["Case", "Question", "Recorder", "Run", "ask", "encoded", "media_item", "placed", "question", "untied"]


@dataclass(frozen=True)
class Case:
    """Pieces of one user message in order: text, or a medium's file."""

    pieces: tuple[str | bytes, ...]
    max_new_tokens: int = 12

    @property
    def pictures(self) -> list[bytes]:
        return [piece for piece in self.pieces if isinstance(piece, bytes)]

    @property
    def messages(self) -> list[dict[str, Any]]:
        content = [
            {"type": "text", "text": piece} if isinstance(piece, str) else as_part(piece) for piece in self.pieces
        ]
        return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class Question:
    """What the engine is told, and what it must answer."""

    reference: Reference
    tokens: list[int]
    items: list[PromptItem]
    embeddings: Mapping[int, torch.Tensor]
    sampling: Sampling
    max_new_tokens: int


def untied(build: Callable[[int], Case], directory: Path) -> tuple[Case, Reference]:
    """The first seed whose reference answer is beyond rounding."""
    for seed in range(20):
        case = build(seed)
        try:
            return case, reference_generate(directory, case.messages, case.pictures, case.max_new_tokens)
        except Tied:
            continue
    raise AssertionError("20 seeds, and the reference is tied in each")


def media_item(directory: Path, file: bytes, index: int, of: int) -> MediaItem:
    family = open_family(directory)
    found = family.span(read_header(family.modalities[0], file, Limits()), of)
    digest = hashlib.blake2b(file, digest_size=16).hexdigest()
    return MediaItem(
        index=index, modality=found.modality, content_hash=digest, of=of, grid=list(found.grid), rows=found.rows
    )


def question(build: Callable[[int], Case], directory: Path, tower: Tower) -> Question:
    """Encoded by the tower in one packed forward; tokens by the reference's tokenizer, places by the family."""
    case, reference = untied(build, directory)
    media = [media_item(directory, file, i, len(case.pictures)) for i, file in enumerate(case.pictures)]
    embeddings = encoded(tower, case.pictures, media)
    items = placed(directory, reference.prompt, media)
    stops = list(open_family(directory).end_token_ids)
    sampling = Sampling(max_tokens=case.max_new_tokens, stop_token_ids=stops)
    return Question(reference, reference.prompt, items, embeddings, sampling, case.max_new_tokens)


def encoded(tower: Tower, files: Sequence[bytes], media: Sequence[MediaItem]) -> dict[int, torch.Tensor]:
    """By item, in one packed forward."""
    prepared = [tower.prepare(file, item) for file, item in zip(files, media, strict=True)]
    return dict(enumerate(tower.encode(prepared))) if prepared else {}


def placed(directory: Path, prompt: list[int], media: Sequence[MediaItem]) -> list[PromptItem]:
    """Where the family's placeholders stand in ``prompt``."""
    family: Any = open_family(directory)
    items, at = [], 0
    for item in media:
        at = prompt.index(family.tokens[item.modality], at)
        items.append(PromptItem(index=item.index, modality=item.modality, grid=item.grid, offset=at, rows=item.rows))
        at += item.rows
    return items


@dataclass
class Run:
    """An engine with the owner of its pages."""

    engine: Engine
    allocator: PageAllocator
    answers: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, FinishReason] = field(default_factory=dict)
    deltas: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    advances: list[list[Advance]] = field(default_factory=list)
    _pages: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def make(cls, language: LanguageModel, *, chunk_tokens: int = 512, pages: int = 512, max_batch: int = 64) -> Run:
        config = EngineConfig(page_size=16, chunk_tokens=chunk_tokens, max_batch=max_batch, kv_tokens=pages * 16)
        pool = KvPool(language.layout(16), pages, language.device)
        return cls(Engine(language, pool, config), PageAllocator(pages))

    def take_pages(self, name: str, tokens: int) -> tuple[int, ...]:
        self._pages[name] = self.allocator.take(pages_for(tokens, 16))
        return self._pages[name]

    def admit(self, name: str, asked: Question, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "id": name,
            "tokens": asked.tokens,
            "items": asked.items,
            "embeddings": asked.embeddings,
            "sampling": asked.sampling,
            "max_new_tokens": asked.max_new_tokens,
        } | changes
        if "pages" not in fields:
            fields["pages"] = self.take_pages(name, len(fields["tokens"]) + fields["max_new_tokens"])
        self.engine.admit(NewSequence(**fields))
        self.answers[name] = []

    def step(self) -> None:
        advances = self.engine.step()
        self.advances.append(advances)
        for advance in advances:
            self._note(advance)
        self.engine.check()
        self.allocator.check()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def _note(self, advance: Advance) -> None:
        self.deltas[advance.id] = advance.rope_delta
        if advance.token is not None:
            self.answers[advance.id].append(advance.token)
        if advance.finished is not None:
            self.finished[advance.id] = advance.finished
        if advance.failed is not None:
            self.failed[advance.id] = advance.failed
        if advance.finished is not None or advance.failed is not None:
            self.allocator.give(self._pages.pop(advance.id))


class Recorder:
    """A language model that remembers the logits it gave."""

    def __init__(self, inner: LanguageModel) -> None:
        self.inner = inner
        self.logits: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, step: StepInput) -> torch.Tensor:
        logits = self.inner.forward(step)
        self.logits.append(logits)
        return logits


def ask(language: LanguageModel, asked: Question, **shapes: int) -> list[int]:
    """The answer of an engine that has nothing else to do."""
    run = Run.make(language, **shapes)
    run.admit("only", asked)
    run.finish()
    assert not run.failed
    return run.answers["only"]


def pictures(seed: int, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    return [picture_bytes(1000 * seed + number, *size) for number, size in enumerate(sizes)]
