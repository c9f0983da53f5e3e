"""The engine: continuous batching of sequences over one KV pool. Synchronous, one thread; owns no page, no socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from epdctl.engine.api import Advance, LanguageModel, NewSequence, StepInput, Visual
from epdctl.engine.attention import PagedBatch, Span
from epdctl.engine.kv import KvPool, Memory, own_memory
from epdctl.engine.pages import pages_for
from epdctl.engine.sampler import Drawn, draw
from epdctl.engine.scheduler import Slice, schedule
from epdctl.engine.sequence import Sequence, SequenceState
from epdctl.engine.settings import Ask
from epdctl.engine.warmup import warm_up
from epdctl.errors import RequestError
from epdctl.wire.config import EngineConfig, ModelConfig

__all__ = ["Engine", "Progress", "build_engine"]

Progress: TypeAlias = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True, slots=True)
class _Part:
    """One sequence's share of a step."""

    sequence: Sequence
    slice: Slice

    @property
    def end(self) -> int:
        return self.slice.start + self.slice.count

    @property
    def span(self) -> Span:
        return Span(self.sequence.new.pages, self.slice.start, self.slice.count)

    @property
    def samples(self) -> bool:
        """Every known token will have been computed: the last one's logits say what comes next."""
        return self.end == len(self.sequence.tokens)


class Engine:
    """Takes sequences that have all their memory, and advances them step by step until they end.

    The caller owns the pages: it must not give them away before ``step`` said ``finished`` or ``failed``, or ``abort``
    returned. ``kv`` is public for the transfer of pages.
    """

    def __init__(self, language: LanguageModel, kv: KvPool, config: EngineConfig) -> None:
        self.language = language
        self.kv = kv
        self.config = config
        self._sequences: dict[str, Sequence] = {}  # in order of arrival

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def admit(self, new: NewSequence) -> None:
        """Raises RequestError (400) for tokens or items the model cannot take, ValueError for a caller's mistake."""
        self._check_memory(new)
        self._check_content(new)
        positions, delta = self._positions(new)
        self._sequences[new.id] = Sequence(new, positions, delta)

    def abort(self, sequence: str) -> None:
        """Forget it; one that is not here (any more) is fine."""
        self._sequences.pop(sequence, None)

    def step(self) -> list[Advance]:
        """One forward over what the scheduler chose; empty without work. What each chosen sequence did."""
        parts = self._chosen()
        if not parts:
            return []
        with torch.inference_mode():
            drawn = iter(self._drawn(self.language.forward(self._input(parts)), parts))
        return [self._advance(part, next(drawn) if part.samples else Drawn()) for part in parts]

    def check(self) -> None:
        """Invariants, for tests and idle times. Raises AssertionError."""
        pages = [page for sequence in self._sequences.values() for page in sequence.new.pages]
        if len(pages) != len(set(pages)):
            raise AssertionError("two sequences share a KV page")
        for name, sequence in self._sequences.items():
            if not 0 <= sequence.computed < len(sequence.tokens):
                raise AssertionError(f"{name}: {sequence.computed} of {len(sequence.tokens)} tokens computed")
            if sequence.state is SequenceState.FINISHED:
                raise AssertionError(f"{name} is finished and still here")

    def _chosen(self) -> list[_Part]:
        work = [sequence.work for sequence in self._sequences.values()]
        slices = schedule(work, chunk_tokens=self.config.chunk_tokens, max_batch=self.config.max_batch)
        return [_Part(self._sequences[each.id], each) for each in slices]

    def _input(self, parts: list[_Part]) -> StepInput:
        device = self.language.device
        ends = torch.tensor([part.slice.count for part in parts]).cumsum(0) - 1
        positions = torch.cat([part.sequence.positions(part.slice.start, part.end) for part in parts], dim=1)
        embeds, visual = self._embeds(parts)
        return StepInput(
            embeds=embeds,
            positions=positions.to(device),
            paged=PagedBatch.build(self.kv, [part.span for part in parts]),
            wanted=ends[torch.tensor([part.samples for part in parts])].to(device),
            visual=visual,
        )

    def _embeds(self, parts: list[_Part]) -> tuple[torch.Tensor, Visual | None]:
        """Of the tokens, with the rows of items laid over their placeholders; and what those rows hold beyond that."""
        tokens = [token for part in parts for token in part.sequence.tokens[part.slice.start : part.end]]
        embeds = self.language.embed(tokens)
        hidden = self.language.hidden_size
        beyond = embeds.new_zeros(len(tokens), self.language.row_width - hidden)
        mask = torch.zeros(len(tokens), dtype=torch.bool)  # on the CPU, so that asking it does not wait for a GPU
        start = 0
        for part in parts:
            for at, rows in _placed(part):
                place = slice(start + at, start + at + len(rows))
                embeds[place], beyond[place] = rows.to(embeds).tensor_split([hidden], dim=1)
                mask[place] = True
            start += part.slice.count
        return embeds, Visual(mask.to(embeds.device), beyond[mask]) if beyond.shape[1] and mask.any() else None

    def _drawn(self, logits: torch.Tensor, parts: list[_Part]) -> list[Drawn]:
        """One for each part that samples, in order."""
        sequences = [part.sequence for part in parts if part.samples]
        return draw(logits, [Ask(sequence.new.sampling, sequence.tokens) for sequence in sequences])

    def _advance(self, part: _Part, drawn: Drawn) -> Advance:
        sequence = part.sequence
        sequence.enter(SequenceState.RUNNING)
        sequence.computed = part.end
        finished = None if drawn.token is None else sequence.append(drawn.token)
        if finished is not None or drawn.failed is not None:
            sequence.enter(SequenceState.FINISHED)
            del self._sequences[sequence.new.id]
        return Advance(
            id=sequence.new.id,
            computed=sequence.computed,
            prompt_done=sequence.prompt_done,
            token=drawn.token,
            finished=finished,
            rope_delta=sequence.rope_delta,
            likelihood=drawn.likelihood,
            failed=drawn.failed,
        )

    def _positions(self, new: NewSequence) -> tuple[torch.Tensor, int]:
        """Once, over the whole prompt. Without items the angle of a token is its index, moved by what came with it."""
        if new.items:
            return self.language.positions(new.tokens, new.items)
        return (torch.arange(len(new.tokens), dtype=torch.int64) + new.rope_delta).expand(3, -1), new.rope_delta

    def _check_memory(self, new: NewSequence) -> None:
        if new.id in self._sequences:
            raise ValueError(f"a sequence {new.id} is here already")
        if not 0 <= new.computed < len(new.tokens) or new.max_new_tokens < 1:
            raise ValueError(f"{new.id}: {new.computed} of {len(new.tokens)} tokens computed, nothing to do")
        needed = pages_for(len(new.tokens) + new.max_new_tokens - 1, self.kv.layout.page_size)
        if len(new.pages) < needed or not all(0 <= page < self.kv.pages for page in new.pages):
            raise ValueError(f"{new.id}: {len(new.pages)} pages of {self.kv.pages}, needs {needed}")

    def _check_content(self, new: NewSequence) -> None:
        """What would otherwise end the step of everyone in the batch."""
        if not all(0 <= token < self.language.vocab_size for token in new.tokens):
            raise RequestError(400, f"the prompt has a token outside the vocabulary of {self.language.vocab_size}")
        for item in new.items:
            if item.offset < 0 or item.offset + item.rows > len(new.tokens):
                raise RequestError(400, f"item {item.index} reaches beyond the prompt of {len(new.tokens)} tokens")
            if item.offset + item.rows > new.computed:
                _check_rows(item.index, item.rows, new.embeddings, self.language.row_width)


def _check_rows(index: int, rows: int, embeddings: Mapping[int, torch.Tensor], width: int) -> None:
    found = embeddings.get(index)
    if found is None:
        raise ValueError(f"no embeddings for item {index}")
    if tuple(found.shape) != (rows, width):
        raise RequestError(
            400, f"item {index} takes {rows} rows of {width} values; its embeddings are {[*found.shape]}"
        )


def _placed(part: _Part) -> Iterator[tuple[int, torch.Tensor]]:
    """The items' rows that fall into this slice: where in it they begin, and [rows, row_width]."""
    start, end = part.slice.start, part.end
    for item in part.sequence.new.items:
        first, last = max(start, item.offset), min(end, item.offset + item.rows)
        if first < last:
            yield first - start, part.sequence.new.embeddings[item.index][first - item.offset : last - item.offset]


def build_engine(
    model: ModelConfig,
    config: EngineConfig,
    device: torch.device,
    progress: Progress | None = None,
    memory: Memory = own_memory,
) -> Engine:
    """``progress(phase, done, total)`` is told of the phases imports, weights, pools and, on a GPU, warm-up, before and
    after each.
    ``memory``: see KvPool.

    Raises LoadError.
    """
    from epdctl.engine.loading import torch_half

    say = progress or (lambda _phase, _done, _total: None)
    say("imports", 0, 1)
    half = torch_half(model)
    say("imports", 1, 1)
    say("weights", 0, 1)
    language = half.load_language(model, device)
    say("weights", 1, 1)
    say("pools", 0, 1)
    kv = KvPool(language.layout(config.page_size), max(1, config.kv_tokens // config.page_size), device, memory)
    say("pools", 1, 1)
    engine = Engine(language, kv, config)
    if device.type == "cuda":
        warm_up(engine, lambda done, total: say("warm-up", done, total))
    return engine
